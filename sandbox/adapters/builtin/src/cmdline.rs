//! The kernel's command line, as a pure function.

use caisson_hypervisor::VmSpec;

/// Console on the serial port, quiet since every byte is an exit; end at once instead of rebooting; no search for hardware that this machine
/// lacks.
const WORDS: &[&str] = &[
    "console=ttyS0",
    "quiet",
    // An oops or a panic speaks up by itself; anything less would be an exit for each byte. The kernel's own log has it.
    "loglevel=2",
    // No probing for chipsets by ports before ACPI has been read: 76 exits to learn that there are none.
    "pci=noearly",
    "panic=-1",
    "no_timer_check",
    "random.trust_cpu=on",
    "i8042.noaux",
    "i8042.nokbd",
    // The machine has no SMI handler, no legacy timers and no ISA beyond the serial port.
    "8250.nr_uarts=1",
    // Tests of its own ciphers, a quarter of the distribution kernel's boot.
    "cryptomgr.notests",
    // For the agent: disks are added to the bus without an announcement.
    "caisson.rescan",
];

/// The whole line.
pub(crate) fn cmdline(spec: &VmSpec) -> String {
    let mut words: Vec<String> = WORDS.iter().map(ToString::to_string).collect();
    if spec.max_vcpus > spec.vcpus {
        words.push(format!("maxcpus={}", spec.vcpus));
    }
    if spec.max_memory_mib > spec.memory_mib {
        // Memory that is plugged is for everything: the kernel's own tables of it too, or a small VM could not grow far.
        words.push("memhp_default_state=online_kernel".to_owned());
    }
    words.extend(spec.cmdline.iter().cloned());
    words.join(" ")
}
