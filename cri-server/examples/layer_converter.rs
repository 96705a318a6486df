//! The converter of layers, for tests of this crate that pull images.

fn main() -> std::process::ExitCode {
    caisson_layer_converter::main()
}
