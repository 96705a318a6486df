//! `caisson-layer-converter`: the crate of that name as a program.

fn main() -> std::process::ExitCode {
    caisson_layer_converter::main()
}
