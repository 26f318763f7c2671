//! How common services are: a table of our own, from common knowledge of internet-wide scans, or nmap's where it is installed (its licence does not
//! let us ship it). Reads one file when asked to; draws nothing.

use std::io::{self, BufRead, BufReader};
use std::path::Path;

/// What a port is used for: services of a class are found together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Class {
    Web,
    Remote,
    Mail,
    Database,
    Infrastructure,
    Device,
    File,
}

/// A TCP or UDP port and the share of responsive hosts that have it open.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Port {
    pub number: u16,
    pub class: Class,
    pub frequency: f64,
}

/// Ports, the most frequent first; those that are as frequent in order of their numbers.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct PortTable(Vec<Port>);

/// Number, class, and hosts in a thousand that have it open.
const BUILT_IN: [(u16, Class, u32); 60] = [
    (443, Class::Web, 330),
    (80, Class::Web, 300),
    (22, Class::Remote, 190),
    (7547, Class::Device, 120),
    (8080, Class::Web, 95),
    (53, Class::Infrastructure, 85),
    (21, Class::File, 75),
    (25, Class::Mail, 65),
    (8443, Class::Web, 60),
    (161, Class::Infrastructure, 55),
    (5060, Class::Device, 52),
    (3389, Class::Remote, 48),
    (123, Class::Infrastructure, 46),
    (23, Class::Remote, 44),
    (3306, Class::Database, 40),
    (554, Class::Device, 38),
    (993, Class::Mail, 36),
    (587, Class::Mail, 34),
    (110, Class::Mail, 32),
    (143, Class::Mail, 31),
    (995, Class::Mail, 28),
    (1723, Class::Infrastructure, 26),
    (445, Class::File, 24),
    (465, Class::Mail, 23),
    (179, Class::Infrastructure, 22),
    (2000, Class::Device, 21),
    (8291, Class::Device, 20),
    (5900, Class::Remote, 19),
    (5432, Class::Database, 18),
    (111, Class::File, 17),
    (2082, Class::Web, 16),
    (2083, Class::Web, 16),
    (139, Class::File, 15),
    (135, Class::Remote, 14),
    (8000, Class::Web, 14),
    (8888, Class::Web, 13),
    (1900, Class::Device, 12),
    (5985, Class::Remote, 11),
    (6379, Class::Database, 10),
    (9000, Class::Device, 10),
    (37777, Class::Device, 9),
    (2222, Class::Remote, 9),
    (81, Class::Web, 9),
    (8081, Class::Web, 8),
    (5555, Class::Device, 8),
    (1433, Class::Database, 8),
    (9200, Class::Database, 7),
    (27017, Class::Database, 7),
    (548, Class::File, 6),
    (873, Class::File, 6),
    (2049, Class::File, 6),
    (1883, Class::Device, 5),
    (11211, Class::Database, 5),
    (389, Class::Infrastructure, 5),
    (500, Class::Infrastructure, 5),
    (10000, Class::Web, 4),
    (5672, Class::Database, 3),
    (502, Class::Device, 2),
    (47808, Class::Device, 2),
    (9100, Class::Device, 2),
];

impl PortTable {
    /// Where nmap's package puts its table. Who reads it gives the table on as a part of the options, so that every node has the same one.
    pub const NMAP_SERVICES: &str = "/usr/share/nmap/nmap-services";

    pub fn built_in() -> Self {
        let port = |&(number, class, thousandths): &(u16, Class, u32)| Port {
            number,
            class,
            frequency: f64::from(thousandths) / 1_000.0,
        };
        Self::sorted(BUILT_IN.iter().map(port).collect())
    }

    /// The TCP ports of nmap's `nmap-services` (name, number/protocol, frequency) that the table of ours has a class for.
    pub fn read_nmap(path: &Path) -> io::Result<Self> {
        let mut ports = Vec::new();
        for line in BufReader::new(std::fs::File::open(path)?).lines() {
            let line = line?;
            let mut words = line.split_whitespace();
            let (Some(name), Some(port), Some(frequency)) = (words.next(), words.next(), words.next()) else {
                continue;
            };
            let number = port.strip_suffix("/tcp").and_then(|number| number.parse().ok());
            let frequency: Option<f64> = frequency.parse().ok().filter(|share| (0.0..=1.0).contains(share));
            let (Some(number), Some(frequency), false) = (number, frequency, name.starts_with('#')) else { continue };
            if let Some(&(_, class, _)) = BUILT_IN.iter().find(|&&(known, ..)| known == number) {
                ports.push(Port { number, class, frequency });
            }
        }
        if ports.is_empty() {
            let problem =
                format!("{} has no line as nmap-services has them: name, number/tcp, frequency", path.display());
            return Err(io::Error::new(io::ErrorKind::InvalidData, problem));
        }
        Ok(Self::sorted(ports))
    }

    pub fn ports(&self) -> &[Port] {
        &self.0
    }

    fn sorted(mut ports: Vec<Port>) -> Self {
        ports.sort_by(|a, b| b.frequency.total_cmp(&a.frequency).then(a.number.cmp(&b.number)));
        Self(ports)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::{BUILT_IN, PortTable};

    #[test]
    fn built_in_ports_are_all_different_and_sorted() {
        let mut numbers: Vec<u16> = BUILT_IN.iter().map(|port| port.0).collect();
        numbers.sort_unstable();
        numbers.dedup();
        assert_eq!(numbers.len(), BUILT_IN.len());
        assert!(PortTable::built_in().ports().is_sorted_by(|a, b| a.frequency >= b.frequency));
    }

    #[test]
    fn nmaps_file_is_read() {
        let mut file = tempfile::NamedTempFile::new().expect("a file");
        write!(file, "# a comment\nhttp\t80/tcp\t0.484143\t# Web\nsnmp\t161/udp\t0.433467\nssh\t22/tcp\t0.182286\nx\t2/tcp\t0.9\n")
            .expect("a written file");
        let table = PortTable::read_nmap(file.path()).expect("a good file");
        let read: Vec<_> = table.ports().iter().map(|port| (port.number, port.frequency)).collect();
        assert_eq!(read, [(80, 0.484143), (22, 0.182286)]);
        assert!(PortTable::read_nmap(std::path::Path::new("/nowhere")).is_err());
    }
}
