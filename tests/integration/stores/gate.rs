//! The way from ranks to a store's server, which a test closes, slows or answers itself. Owns its connections; changes no byte that it passes.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;

/// What becomes of what clients send.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mode {
    Open,
    /// As a store answers whose session token is over.
    Expired,
    /// So many bytes get through, then nothing does until the mode changes.
    Stall {
        after: usize,
    },
}

pub struct Gate {
    pub port: u16,
    shared: Arc<Shared>,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    mode: Mode,
    /// Since the mode was set.
    passed: usize,
    stalled: bool,
    answered: usize,
}

const EXPIRED: &str =
    "<?xml version=\"1.0\"?><Error><Code>ExpiredToken</Code><Message>The provided token has expired.</Message></Error>";

impl Gate {
    /// In front of the server at `server`. Its threads end with the test process.
    pub fn before(server: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let port = listener.local_addr().expect("an address").port();
        let state = State { mode: Mode::Open, passed: 0, stalled: false, answered: 0 };
        let shared = Arc::new(Shared { state: Mutex::new(state), changed: Condvar::new() });
        let ours = shared.clone();
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let shared = ours.clone();
                thread::spawn(move || drop(serve(client, server, &shared)));
            }
        });
        Self { port, shared }
    }

    pub fn set(&self, mode: Mode) {
        let mut state = self.shared.state.lock().expect("a whole gate");
        *state = State { mode, passed: 0, stalled: false, answered: 0 };
        self.shared.changed.notify_all();
    }

    /// Whether something waits here.
    pub fn is_stalled(&self) -> bool {
        self.shared.state.lock().expect("a whole gate").stalled
    }

    /// How many requests were answered here.
    pub fn answered(&self) -> usize {
        self.shared.state.lock().expect("a whole gate").answered
    }
}

fn serve(mut client: TcpStream, server: u16, shared: &Shared) -> std::io::Result<()> {
    let mut upstream = TcpStream::connect(("127.0.0.1", server))?;
    let (mut back, mut answers) = (client.try_clone()?, upstream.try_clone()?);
    thread::spawn(move || {
        let _ = std::io::copy(&mut answers, &mut back);
        let _ = back.shutdown(Shutdown::Both);
    });
    let mut bytes = vec![0; 64 << 10];
    loop {
        let read = client.read(&mut bytes)?;
        if read == 0 {
            return upstream.shutdown(Shutdown::Both);
        }
        if shared.is_refused(read) {
            let answer = format!(
                "HTTP/1.1 400 Bad Request\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{EXPIRED}",
                EXPIRED.len()
            );
            client.write_all(answer.as_bytes())?;
            // A client that still sends must not be cut off before it reads.
            while client.read(&mut bytes)? > 0 {}
            return upstream.shutdown(Shutdown::Both);
        }
        upstream.write_all(&bytes[..read])?;
    }
}

impl Shared {
    /// Waits while nothing gets through; whether the answer is given here.
    fn is_refused(&self, read: usize) -> bool {
        let mut state = self.state.lock().expect("a whole gate");
        state.passed += read;
        loop {
            match state.mode {
                Mode::Open => return false,
                Mode::Expired => {
                    state.answered += 1;
                    return true;
                }
                Mode::Stall { after } if state.passed <= after => return false,
                Mode::Stall { .. } => {
                    state.stalled = true;
                    state = self.changed.wait(state).expect("a whole gate");
                }
            }
        }
    }
}
