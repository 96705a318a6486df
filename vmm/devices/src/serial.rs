//! The serial port 16550A, one way: what a guest's kernel says before and beside everything else, a panic above all.
//!
//! Bytes leave in lines, so that one exit of the guest is not one write to a file, and only so many of them: a guest cannot fill the
//! host's disk.

use std::{
    fmt,
    io::{self, Write},
    sync::{Mutex, MutexGuard, PoisonError},
};

use serde::{Deserialize, Serialize};
use vm_superio::{Serial, SerialState, Trigger};
use vmm_sys_util::eventfd::EventFd;

use crate::ports::BusDevice;

/// First port of COM1.
pub const COM1: u64 = 0x3f8;
/// Ports of a serial port.
pub const PORTS: u64 = 8;
/// Interrupt line of COM1.
pub const COM1_IRQ: u32 = 4;

/// Longest line that is held back.
const LINE_BYTES: usize = 256;

/// Last words of a console that has said too much.
const CUT: &[u8] = b"\n[console output ends here: limit reached]\n";

/// Raises the port's interrupt.
#[derive(Debug)]
struct Line(EventFd);

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// Where lines go.
struct Lines<W: Write> {
    sink: W,
    line: Vec<u8>,
    left: u64,
}

impl<W: Write> Lines<W> {
    /// A sink that is full or gone loses the line: the guest must not wait for it.
    fn give(&mut self, bytes: &[u8]) {
        let granted = usize::try_from(self.left).unwrap_or(usize::MAX).min(bytes.len());
        self.left -= granted as u64;
        let mut whole = self.sink.write_all(bytes.get(..granted).unwrap_or_default());
        if granted > 0 && self.left == 0 {
            whole = whole.and_then(|()| self.sink.write_all(CUT));
        }
        drop(whole);
    }
}

impl<W: Write> Write for Lines<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        for &byte in bytes {
            self.line.push(byte);
            if byte == b'\n' || self.line.len() >= LINE_BYTES {
                let line = std::mem::take(&mut self.line);
                self.give(&line);
                self.line = line;
                self.line.clear();
            }
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<W: Write> Drop for Lines<W> {
    fn drop(&mut self) {
        let line = std::mem::take(&mut self.line);
        self.give(&line);
    }
}

/// Registers of a port, and what it has not been read of. For those who keep a paused machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "the names of the registers")]
pub struct PortState {
    pub baud_divisor: [u8; 2],
    pub interrupt_enable: u8,
    pub interrupt_identification: u8,
    pub line_control: u8,
    pub line_status: u8,
    pub modem_control: u8,
    pub modem_status: u8,
    pub scratch: u8,
    pub unread: Vec<u8>,
}

impl From<SerialState> for PortState {
    fn from(state: SerialState) -> Self {
        Self {
            baud_divisor: [state.baud_divisor_low, state.baud_divisor_high],
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            unread: state.in_buffer,
        }
    }
}

impl From<&PortState> for SerialState {
    fn from(state: &PortState) -> Self {
        let [baud_divisor_low, baud_divisor_high] = state.baud_divisor;
        Self {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            in_buffer: state.unread.clone(),
        }
    }
}

/// A serial port whose output goes to `W`.
pub struct SerialPort<W: Write + Send> {
    uart: Mutex<Serial<Line, vm_superio::serial::NoEvents, Lines<W>>>,
}

impl<W: Write + Send> fmt::Debug for SerialPort<W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SerialPort").finish_non_exhaustive()
    }
}

impl<W: Write + Send> SerialPort<W> {
    /// A port that raises `interrupt`, and writes at most `most` bytes to `sink`.
    pub fn new(interrupt: EventFd, sink: W, most: u64) -> Self {
        let lines = Lines {
            sink,
            line: Vec::with_capacity(LINE_BYTES),
            left: most,
        };
        Self {
            uart: Mutex::new(Serial::new(Line(interrupt), lines)),
        }
    }

    /// A port that goes on where another one was; nothing if no port was ever in that state.
    pub fn restored(interrupt: EventFd, sink: W, most: u64, state: &PortState) -> Option<Self> {
        let lines = Lines {
            sink,
            line: Vec::with_capacity(LINE_BYTES),
            left: most,
        };
        let uart = Serial::from_state(
            &state.into(),
            Line(interrupt),
            vm_superio::serial::NoEvents,
            lines,
        );
        Some(Self {
            uart: Mutex::new(uart.ok()?),
        })
    }

    /// What it is.
    #[must_use]
    pub fn state(&self) -> PortState {
        self.lock().state().into()
    }

    /// Writes out the line that is being held back, when the VM ends.
    pub fn flush(&self) {
        let mut uart = self.lock();
        let lines = uart.writer_mut();
        let line = std::mem::take(&mut lines.line);
        lines.give(&line);
    }

    fn lock(&self) -> MutexGuard<'_, Serial<Line, vm_superio::serial::NoEvents, Lines<W>>> {
        self.uart.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<W: Write + Send> BusDevice for SerialPort<W> {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let mut uart = self.lock();
        for (at, slot) in (offset..PORTS).zip(data) {
            *slot = uart.read((at & 7) as u8);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut uart = self.lock();
        for (at, byte) in (offset..PORTS).zip(data) {
            // Only the interrupt can fail, and a guest whose interrupt is lost asks again by itself.
            drop(uart.write((at & 7) as u8, *byte));
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<Vec<u8>>>>);

    impl Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().push(bytes.to_vec());
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn say(port: &SerialPort<Sink>, text: &[u8]) {
        for byte in text {
            port.write(0, &[*byte]);
        }
    }

    #[test]
    fn output_leaves_line_by_line() {
        let sink = Sink::default();
        let port = SerialPort::new(EventFd::new(libc_nonblocking()).unwrap(), sink.clone(), 1000);
        say(&port, b"one\ntwo");
        assert_eq!(*sink.0.lock().unwrap(), [b"one\n"]);
        port.flush();
        assert_eq!(sink.0.lock().unwrap().last().unwrap(), b"two");
        let mut status = [0];
        port.read(5, &mut status);
        assert_eq!(status[0] & 0x60, 0x60, "ready for more");
    }

    #[test]
    fn a_port_goes_on_where_another_one_was() {
        let event = || EventFd::new(libc_nonblocking()).unwrap();
        let port = SerialPort::new(event(), Sink::default(), 100);
        for (register, value) in [
            (3, 0x83),
            (0, 0x12),
            (1, 0x34),
            (3, 0x03),
            (1, 1),
            (4, 0x0b),
            (7, 0x5a),
        ] {
            port.write(register, &[value]);
        }
        let state = port.state();
        assert_eq!((state.baud_divisor, state.scratch), ([0x12, 0x34], 0x5a));
        let other = SerialPort::restored(event(), Sink::default(), 100, &state).unwrap();
        assert_eq!(other.state(), state);
        for register in [2, 3, 4, 5, 6, 7] {
            let (mut one, mut two) = ([0], [0]);
            port.read(register, &mut one);
            other.read(register, &mut two);
            assert_eq!(one, two, "register {register}");
        }
        let impossible = PortState {
            unread: vec![0; 1000],
            ..state
        };
        assert!(SerialPort::restored(event(), Sink::default(), 100, &impossible).is_none());
    }

    #[test]
    fn a_guest_that_says_too_much_is_cut_off() {
        let sink = Sink::default();
        let port = SerialPort::new(EventFd::new(libc_nonblocking()).unwrap(), sink.clone(), 10);
        say(&port, &b"12345\n".repeat(100));
        let said = sink.0.lock().unwrap().concat();
        assert_eq!(said, [b"12345\n1234".as_slice(), CUT].concat());
    }

    fn libc_nonblocking() -> i32 {
        vmm_sys_util::eventfd::EFD_NONBLOCK
    }
}
