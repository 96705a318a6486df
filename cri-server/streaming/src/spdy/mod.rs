//! SPDY/3.1 as a server of streams that clients open, to be read beside the specification (draft-mbelshe-httpbis-spdy-00 and the 3.1
//! change to flow control). [`frame`] is sections 2.2 and 2.6, [`headers`] is 2.6.10; both are pure. [`session`] is section 2 at work.
//!
//! Flow control (2.6.8) in one direction only: clients are granted windows as their bytes are taken, but theirs are not enforced here,
//! because the clients in the field neither send nor understand WINDOW_UPDATE and would stand still after 64 KiB. What holds a sender
//! back instead is TCP.

pub mod frame;
pub mod headers;
pub(crate) mod session;
