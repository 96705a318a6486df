//! Signal names to numbers of signal(7) on x86-64 and arm64, as images and the CRI write them.

use caisson_cri_api::v1;

/// SIGTERM, what StopContainer sends when neither the container nor its image says otherwise.
pub(crate) const SIGTERM: u32 = 15;

const RTMIN: u32 = 34;
const RTMAX: u32 = 64;

const NAMED: [(&str, u32); 34] = [
    ("HUP", 1),
    ("INT", 2),
    ("QUIT", 3),
    ("ILL", 4),
    ("TRAP", 5),
    ("ABRT", 6),
    ("IOT", 6),
    ("BUS", 7),
    ("FPE", 8),
    ("KILL", 9),
    ("USR1", 10),
    ("SEGV", 11),
    ("USR2", 12),
    ("PIPE", 13),
    ("ALRM", 14),
    ("TERM", 15),
    ("STKFLT", 16),
    ("CHLD", 17),
    ("CLD", 17),
    ("CONT", 18),
    ("STOP", 19),
    ("TSTP", 20),
    ("TTIN", 21),
    ("TTOU", 22),
    ("URG", 23),
    ("XCPU", 24),
    ("XFSZ", 25),
    ("VTALRM", 26),
    ("PROF", 27),
    ("WINCH", 28),
    ("IO", 29),
    ("POLL", 29),
    ("PWR", 30),
    ("SYS", 31),
];

/// The number of a signal: `15`, `TERM`, `SIGTERM`, `SIGRTMIN+3`, `RTMAX-1` or the CRI's `SIGRTMINPLUS3`.
#[must_use]
pub fn signal_number(text: &str) -> Option<u32> {
    if let Ok(number) = text.parse::<u32>() {
        return (1..=RTMAX).contains(&number).then_some(number);
    }
    let upper = text.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    if let Some((_, number)) = NAMED.iter().find(|(known, _)| *known == name) {
        return Some(*number);
    }
    realtime(name)
}

fn realtime(name: &str) -> Option<u32> {
    let (from, rest, up) = match (name.strip_prefix("RTMIN"), name.strip_prefix("RTMAX")) {
        (Some(rest), _) => (RTMIN, rest, true),
        (_, Some(rest)) => (RTMAX, rest, false),
        _ => return None,
    };
    if rest.is_empty() {
        return Some(from);
    }
    let offset = if up {
        rest.strip_prefix("PLUS").or_else(|| rest.strip_prefix('+'))?
    } else {
        rest.strip_prefix("MINUS").or_else(|| rest.strip_prefix('-'))?
    };
    let offset = offset.parse::<u32>().ok().filter(|n| *n <= RTMAX - RTMIN)?;
    Some(if up { from + offset } else { from - offset })
}

/// The CRI's word for a signal number.
#[must_use]
pub fn cri_signal(number: u32) -> v1::Signal {
    (1..=65)
        .filter_map(|value| v1::Signal::try_from(value).ok())
        .find(|signal| signal_number(signal.as_str_name()) == Some(number))
        .unwrap_or(v1::Signal::RuntimeDefault)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_are_understood_however_they_are_written() {
        let cases = [
            ("15", Some(15)),
            ("TERM", Some(15)),
            ("SIGTERM", Some(15)),
            ("sigquit", Some(3)),
            ("SIGRTMIN", Some(34)),
            ("SIGRTMIN+3", Some(37)),
            ("RTMAX-1", Some(63)),
            ("SIGRTMINPLUS15", Some(49)),
            ("SIGRTMAXMINUS14", Some(50)),
            ("0", None),
            ("65", None),
            ("SIGRTMIN+31", None),
            ("SIGRTMIN-1", None),
            ("SIGNAL", None),
            ("", None),
        ];
        for (text, number) in cases {
            assert_eq!(signal_number(text), number, "{text}");
        }
    }

    #[test]
    fn every_signal_of_the_cri_has_a_number_and_the_way_back() {
        for value in 1..=65 {
            let signal = v1::Signal::try_from(value).unwrap();
            let number = signal_number(signal.as_str_name()).unwrap();
            assert_eq!(signal_number(cri_signal(number).as_str_name()), Some(number));
        }
        assert_eq!(cri_signal(15), v1::Signal::Sigterm);
        assert_eq!(cri_signal(0), v1::Signal::RuntimeDefault);
    }
}
