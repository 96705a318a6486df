//! The serial port 16550A, one way: what a guest's kernel says before and beside everything else, a panic above all.
//!
//! Bytes leave in lines, so that one exit of the guest is not one write to a file, and only so many of them: a guest cannot fill the
//! host's disk.

use std::{
    fmt,
    io::{self, Write},
    sync::{Mutex, MutexGuard, PoisonError},
};

use vm_superio::{Serial, Trigger};
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
