//! The ACPI tables: no more than a kernel needs to find its CPUs, its interrupt controller, the PCI host bridge and the power switch.
//!
//! Hardware-reduced ACPI (ACPI 6.5, 4.1): no power management timer, no legacy interrupt controller, no CMOS clock, so that the guest
//! does not look for any of them; each look would be an exit.

use acpi_tables::{
    Aml,
    aml::{self, AddressSpace, AddressSpaceCacheable},
    fadt::{FADTBuilder, Flags},
    gas::{self, AccessSize, GAS},
    madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic},
    mcfg::MCFG,
    rsdp::Rsdp,
    sdt::Sdt,
    xsdt::XSDT,
};

use crate::{
    layout::{
        ACPI, ECAM, IO_APIC, LOCAL_APIC, PCI_WINDOW, RESET_PORT, RESET_VALUE, SERIAL_GSI, SERIAL_PORT,
        SLEEP_CONTROL_PORT, SLEEP_STATUS_PORT,
    },
    power::S5_TYPE,
};

const OEM: [u8; 6] = *b"CAISSN";
const TABLE: [u8; 8] = *b"CAISSON ";
const REVISION: u32 = 1;

/// IAPC_BOOT_ARCH (ACPI 6.5, 5.2.9.3): there is no VGA to be found by probing.
const NO_VGA: u16 = 1 << 2;
/// IAPC_BOOT_ARCH: there is no CMOS clock.
const NO_CMOS_CLOCK: u16 = 1 << 5;

/// What the tables tell of the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Described {
    /// vCPUs that are present, running or not. The guest decides which it starts, by `maxcpus=` and by `online`.
    pub cpus: u8,
    /// Whether there is a serial port.
    pub serial: bool,
}

/// The tables are too large for their place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{0} bytes of ACPI tables do not fit")]
pub struct AcpiError(usize);

/// The tables as bytes to be put at [`ACPI`]; the RSDP comes first.
pub fn tables(described: Described) -> Result<Vec<u8>, AcpiError> {
    let mut area = Area {
        bytes: vec![0; Rsdp::len()],
    };
    let dsdt = area.add(&dsdt(described.serial));
    let fadt = area.add(&fadt(dsdt));
    let madt = area.add(&madt(described.cpus));
    let mut mcfg = MCFG::new(OEM, TABLE, REVISION);
    mcfg.add_ecam(ECAM.start, 0, 0, 0);
    let mcfg = area.add(&mcfg);
    let mut xsdt = XSDT::new(OEM, TABLE, REVISION);
    for table in [fadt, madt, mcfg] {
        xsdt.add_entry(table);
    }
    let xsdt = area.add(&xsdt);
    let mut rsdp = Vec::new();
    Rsdp::new(OEM, xsdt).to_aml_bytes(&mut rsdp);
    area.bytes[..rsdp.len()].copy_from_slice(&rsdp);
    if area.bytes.len() as u64 > ACPI.end - ACPI.start {
        return Err(AcpiError(area.bytes.len()));
    }
    Ok(area.bytes)
}

struct Area {
    bytes: Vec<u8>,
}

impl Area {
    /// Adds a table: its guest-physical address.
    fn add(&mut self, table: &dyn Aml) -> u64 {
        self.bytes.resize(self.bytes.len().next_multiple_of(16), 0);
        let address = ACPI.start + self.bytes.len() as u64;
        table.to_aml_bytes(&mut self.bytes);
        address
    }
}

fn fadt(dsdt: u64) -> acpi_tables::fadt::FADT {
    let port = |number: u16| {
        GAS::new(
            gas::AddressSpace::SystemIo,
            8,
            0,
            AccessSize::ByteAccess,
            number.into(),
        )
    };
    let mut fadt = FADTBuilder::new(OEM, TABLE, REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        // Set: no such button in the fixed registers, which do not exist.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    fadt.iapc_boot_arch = (NO_VGA | NO_CMOS_CLOCK).into();
    fadt.reset_reg = port(RESET_PORT);
    fadt.reset_value = RESET_VALUE;
    fadt.sleep_control_reg = port(SLEEP_CONTROL_PORT);
    fadt.sleep_status_reg = port(SLEEP_STATUS_PORT);
    fadt.finalize()
}

fn madt(cpus: u8) -> MADT {
    let mut madt = MADT::new(
        OEM,
        TABLE,
        REVISION,
        LocalInterruptController::Address(LOCAL_APIC as u32),
    );
    for id in 0..cpus {
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, IO_APIC as u32, 0));
    madt
}

fn dsdt(serial: bool) -> Sdt {
    let mut code = Vec::new();
    host_bridge(&mut code);
    if serial {
        serial_port(&mut code);
    }
    let sleep_type = aml::Package::new(vec![&S5_TYPE, &0u8]);
    aml::Name::new("_S5_".into(), &sleep_type).to_aml_bytes(&mut code);
    let mut table = Sdt::new(*b"DSDT", 36, 6, OEM, TABLE, REVISION);
    table.append_slice(&code);
    table
}

fn host_bridge(code: &mut Vec<u8>) {
    let window = AddressSpace::new_memory(
        AddressSpaceCacheable::NotCacheable,
        true,
        PCI_WINDOW.start as u32,
        (PCI_WINDOW.end - 1) as u32,
        None,
    );
    let buses = AddressSpace::new_bus_number(0u16, 0u16);
    aml::Device::new(
        "_SB_.PCI0".into(),
        vec![
            &aml::Name::new("_HID".into(), &aml::EISAName::new("PNP0A08")),
            &aml::Name::new("_CID".into(), &aml::EISAName::new("PNP0A03")),
            &aml::Name::new("_UID".into(), &0u8),
            &aml::Name::new("_CRS".into(), &aml::ResourceTemplate::new(vec![&buses, &window])),
        ],
    )
    .to_aml_bytes(code);
    // The kernel believes in the configuration space only if somebody else claims it, too.
    let ecam = aml::Memory32Fixed::new(true, ECAM.start as u32, (ECAM.end - ECAM.start) as u32);
    aml::Device::new(
        "_SB_.MBRD".into(),
        vec![
            &aml::Name::new("_HID".into(), &aml::EISAName::new("PNP0C02")),
            &aml::Name::new("_UID".into(), &0u8),
            &aml::Name::new("_CRS".into(), &aml::ResourceTemplate::new(vec![&ecam])),
        ],
    )
    .to_aml_bytes(code);
}

fn serial_port(code: &mut Vec<u8>) {
    let interrupt = aml::Interrupt::new(true, true, false, false, SERIAL_GSI);
    let ports = aml::IO::new(SERIAL_PORT, SERIAL_PORT, 0, 8);
    aml::Device::new(
        "_SB_.COM1".into(),
        vec![
            &aml::Name::new("_HID".into(), &aml::EISAName::new("PNP0501")),
            &aml::Name::new("_UID".into(), &0u8),
            &aml::Name::new(
                "_CRS".into(),
                &aml::ResourceTemplate::new(vec![&interrupt, &ports]),
            ),
        ],
    )
    .to_aml_bytes(code);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn word(bytes: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
    }

    fn long(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    /// The table at a guest-physical address.
    fn table(area: &[u8], address: u64) -> &[u8] {
        let at = usize::try_from(address - ACPI.start).unwrap();
        &area[at..at + word(area, at + 4) as usize]
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    #[test]
    fn every_table_is_reached_from_the_first_and_has_a_right_checksum() {
        let area = tables(Described {
            cpus: 3,
            serial: true,
        })
        .unwrap();
        assert_eq!(&area[..8], b"RSD PTR ");
        assert_eq!((sum(&area[..20]), sum(&area[..36])), (0, 0));
        let xsdt = table(&area, long(&area, 24));
        assert_eq!((&xsdt[..4], sum(xsdt)), (&b"XSDT"[..], 0));
        let mut seen = Vec::new();
        for entry in xsdt[36..].chunks(8) {
            let table = table(&area, long(entry, 0));
            assert_eq!(sum(table), 0);
            seen.push(String::from_utf8(table[..4].to_vec()).unwrap());
            if table.starts_with(b"FACP") {
                let dsdt = super::tests::table(&area, long(table, 140));
                assert_eq!((&dsdt[..4], sum(dsdt)), (&b"DSDT"[..], 0));
            }
        }
        assert_eq!(seen, ["FACP", "APIC", "MCFG"]);
    }

    #[test]
    fn every_cpu_is_present() {
        for cpus in [1, 2, 254] {
            let mut bytes = Vec::new();
            madt(cpus).to_aml_bytes(&mut bytes);
            let local = bytes[44..].chunks(8).take_while(|entry| entry[0] == 0);
            assert_eq!(local.clone().count(), usize::from(cpus));
            for (id, entry) in local.enumerate() {
                assert_eq!((usize::from(entry[3]), word(entry, 4)), (id, 1));
            }
        }
    }

    #[test]
    fn the_largest_machine_fits() {
        let area = tables(Described {
            cpus: 254,
            serial: true,
        })
        .unwrap();
        assert!(area.len() < 8192, "{}", area.len());
    }
}
