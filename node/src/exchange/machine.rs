//! Which ranks are on one machine, and how the first of them hands the others memory to exchange through. Owns the door by which it does so: an
//! abstract socket with a random name, opened by a cookie that went to the others over their own connections.
//!
//! V1: either all ranks of a machine have the memory, or none uses it: each tells all members of the generation whether it does (`Sharing`).

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::SocketAddr;
use std::sync::OnceLock;
use std::time::Duration;

use rand::Rng;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};
use stoke_protocol::message::peer::{Door, Machine};
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::net::{UnixListener, UnixStream};
use tokio::time::timeout;

use super::memory::{Layout, Memory};

/// From where the first rank has met all others until those of its machine, who have to meet all too, have mapped the memory.
const MAP_MAX: Duration = Duration::from_secs(5);
/// The word of a rank that has mapped it; beside the file descriptor, nothing.
const MAPPED: u8 = 1;

/// The machine of this process, as far as memory can be handed from process to process: one boot, one network namespace (of which abstract
/// sockets are), one user.
pub fn here() -> Option<Machine> {
    static HERE: OnceLock<Option<Machine>> = OnceLock::new();
    *HERE.get_or_init(|| {
        let boot = std::fs::read("/proc/sys/kernel/random/boot_id").ok()?;
        let network = std::fs::read_link("/proc/self/ns/net").ok()?;
        let user = rustix::process::geteuid().as_raw().to_le_bytes();
        let mut hasher = blake3::Hasher::new();
        hasher.update(&boot).update(network.as_os_str().as_encoded_bytes()).update(&user);
        let mut machine = [0; 16];
        machine.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
        Some(Machine(machine))
    })
}

/// A door that is open, and what others need to come in.
pub struct Open {
    listener: UnixListener,
    pub door: Door,
}

impl Open {
    pub fn new() -> io::Result<Self> {
        let door = Door { name: rand::rng().random(), cookie: rand::rng().random() };
        let listener = std::os::unix::net::UnixListener::bind_addr(&address(&door)?)?;
        listener.set_nonblocking(true)?;
        Ok(Self { listener: UnixListener::from_std(listener)?, door })
    }

    /// Makes memory and gives it to so many others.
    pub async fn give(self, layout: Layout, others: usize) -> io::Result<Memory> {
        let (memory, fd) = Memory::make(layout)?;
        let given = async {
            let mut mapped = 0;
            while mapped < others {
                let (stream, _) = self.listener.accept().await?;
                mapped += usize::from(self.hand(stream, &fd).await.is_some());
            }
            Ok(())
        };
        let late = |_| Err(io::ErrorKind::TimedOut.into());
        timeout(MAP_MAX, given).await.unwrap_or_else(late).map(|()| memory)
    }

    /// None: whoever came is no rank of the generation, or could not map it; then it will be missed.
    async fn hand(&self, mut stream: UnixStream, fd: &OwnedFd) -> Option<()> {
        let mut cookie = [0; 16];
        stream.read_exact(&mut cookie).await.ok()?;
        // Compared as hashes: in constant time.
        if blake3::hash(&cookie) != blake3::hash(&self.door.cookie) {
            return None;
        }
        stream.async_io(Interest::WRITABLE, || send(&stream, fd)).await.ok()?;
        (stream.read_u8().await.ok()? == MAPPED).then_some(())
    }
}

/// The memory that the rank behind this door has made.
pub async fn take(door: &Door, layout: Layout) -> io::Result<Memory> {
    let stream = std::os::unix::net::UnixStream::connect_addr(&address(door)?)?;
    stream.set_nonblocking(true)?;
    let mut stream = UnixStream::from_std(stream)?;
    stream.write_all(&door.cookie).await?;
    let fd = stream.async_io(Interest::READABLE, || receive(&stream)).await?;
    let memory = Memory::map(fd, layout)?;
    stream.write_u8(MAPPED).await?;
    Ok(memory)
}

fn address(door: &Door) -> io::Result<SocketAddr> {
    SocketAddr::from_abstract_name(door.name)
}

fn send(stream: &UnixStream, fd: &OwnedFd) -> io::Result<()> {
    let fds = [fd.as_fd()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    control.push(SendAncillaryMessage::ScmRights(&fds));
    sendmsg(stream, &[IoSlice::new(&[MAPPED])], &mut control, SendFlags::NOSIGNAL)?;
    Ok(())
}

fn receive(stream: &UnixStream) -> io::Result<OwnedFd> {
    let (mut byte, mut space) = ([0], [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))]);
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = recvmsg(stream, &mut [IoSliceMut::new(&mut byte)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let fds = control.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(fds) => Some(fds),
        _ => None,
    });
    let fd = fds.flatten().next();
    fd.filter(|_| !received.flags.contains(ReturnFlags::CTRUNC)).ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
}
