//! A TCP port that is kept for a rank's command: its number is in the membership, so that the others' commands know where to find the first rank.
//! Bound and not listening, so that whoever comes too early is refused and tries again.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;

use rustix::net::sockopt::set_socket_reuseaddr;
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, getsockname, socket_with};

#[derive(Debug)]
pub struct Port {
    address: SocketAddr,
    kept: Option<OwnedFd>,
}

impl Port {
    /// One that is free on this address.
    pub fn reserve(ip: IpAddr) -> io::Result<Self> {
        let kept = bound(SocketAddr::new(ip, 0))?;
        let address = SocketAddr::try_from(getsockname(&kept)?)?;
        Ok(Self { address, kept: Some(kept) })
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// It is the command's now.
    pub fn free(&mut self) {
        self.kept = None;
    }

    /// The command is gone, and its connections may linger.
    pub fn take(&mut self) -> io::Result<()> {
        if self.kept.is_none() {
            let kept = bound(self.address).map_err(|error| {
                io::Error::new(error.kind(), format!("keep port {} for the command: {error}", self.address))
            })?;
            self.kept = Some(kept);
        }
        Ok(())
    }
}

fn bound(address: SocketAddr) -> io::Result<OwnedFd> {
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let socket = socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    set_socket_reuseaddr(&socket, address.port() != 0)?;
    bind(&socket, &address)?;
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, TcpListener, TcpStream};

    use super::*;

    #[test]
    fn nobody_else_gets_a_port_that_is_kept_and_its_command_does() {
        let mut port = Port::reserve(Ipv4Addr::LOCALHOST.into()).unwrap();
        let address = port.address();
        assert!(TcpListener::bind(address).is_err(), "it is kept");
        assert!(TcpStream::connect(address).is_err(), "nobody listens yet");
        port.free();
        let command = TcpListener::bind(address).unwrap();
        let client = TcpStream::connect(address).unwrap();
        let served = command.accept().unwrap();
        drop((command, served, client));
        port.take().unwrap();
        assert!(TcpStream::connect(address).is_err());
    }
}
