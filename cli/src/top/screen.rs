//! The terminal of `stoke top`: cells are written as ANSI sequences on its other page, keys come from a thread. Gives the terminal back when it is dropped.

use std::io::{self, Stdout, Write};
use std::process::{Command, Stdio};

use console::{Key, Term};
use ratatui::backend::{Backend, ClearType, WindowSize};
use ratatui::buffer::Cell;
use ratatui::layout::{Position, Size};
use ratatui::style::{Color, Modifier};
use tokio::sync::mpsc;

/// Another page, without a cursor; and back.
const TAKE: &str = "\x1b[?1049h\x1b[?25l\x1b[2J";
const GIVE: &str = "\x1b[0m\x1b[?25h\x1b[?1049l";

/// Keys that wait to be taken.
const KEYS_WAITING_MAX: usize = 16;

pub struct Screen {
    stdout: Stdout,
    /// As `stty -g` tells them.
    settings: String,
}

impl Screen {
    pub fn take() -> Self {
        let settings = stty(&["-g"]);
        // Keys come one by one and are not shown, also those that nobody reads yet.
        stty(&["-icanon", "-echo"]);
        let mut screen = Self { stdout: io::stdout(), settings };
        screen.say(TAKE);
        screen
    }

    /// A terminal that is gone shows nothing, and its keys end.
    fn say(&mut self, words: &str) {
        let _gone = self.stdout.write_all(words.as_bytes()).and_then(|()| self.stdout.flush());
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        self.say(GIVE);
        stty(&[if self.settings.is_empty() { "sane" } else { &self.settings }]);
    }
}

/// What it says; nothing where it is not there.
fn stty(arguments: &[&str]) -> String {
    let said = Command::new("stty").args(arguments).stdin(Stdio::inherit()).output();
    said.map(|said| String::from_utf8_lossy(&said.stdout).trim().to_owned()).unwrap_or_default()
}

impl Backend for Screen {
    type Error = io::Error;

    fn draw<'a, I>(&mut self, content: I) -> io::Result<()>
    where
        I: Iterator<Item = (u16, u16, &'a Cell)>,
    {
        let mut text = String::new();
        let mut next = None;
        let mut style = None;
        for (x, y, cell) in content {
            if next != Some((x, y)) {
                text.push_str(&format!("\x1b[{};{}H", y + 1, x + 1));
            }
            if style != Some((cell.fg, cell.modifier)) {
                text.push_str(&sequence(cell.fg, cell.modifier));
                style = Some((cell.fg, cell.modifier));
            }
            text.push_str(cell.symbol());
            next = Some((x + 1, y));
        }
        text.push_str("\x1b[0m");
        self.stdout.write_all(text.as_bytes())
    }

    fn hide_cursor(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn show_cursor(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn get_cursor_position(&mut self) -> io::Result<Position> {
        Ok(Position::ORIGIN)
    }

    fn set_cursor_position<P: Into<Position>>(&mut self, _position: P) -> io::Result<()> {
        Ok(())
    }

    fn clear(&mut self) -> io::Result<()> {
        self.stdout.write_all(b"\x1b[0m\x1b[2J")
    }

    fn clear_region(&mut self, _region: ClearType) -> io::Result<()> {
        self.clear()
    }

    fn size(&self) -> io::Result<Size> {
        let (height, width) = Term::stdout().size();
        Ok(Size { width, height })
    }

    fn window_size(&mut self) -> io::Result<WindowSize> {
        Ok(WindowSize { columns_rows: self.size()?, pixels: Size::default() })
    }

    fn flush(&mut self) -> io::Result<()> {
        self.stdout.flush()
    }
}

/// Colours that `draw` uses, and how letters stand.
fn sequence(colour: Color, modifier: Modifier) -> String {
    let colour = match colour {
        Color::Red => ";31",
        Color::Green => ";32",
        Color::Yellow => ";33",
        Color::DarkGray => ";90",
        _ => "",
    };
    let set = [(Modifier::BOLD, ";1"), (Modifier::DIM, ";2"), (Modifier::REVERSED, ";7")];
    let set: String = set.into_iter().filter(|(one, _)| modifier.contains(*one)).map(|(_, code)| code).collect();
    format!("\x1b[0{colour}{set}m")
}

/// The terminal blocks: its keys come from a thread of their own, which ends with the process.
pub fn keys() -> mpsc::Receiver<Key> {
    let (tell, pressed) = mpsc::channel(KEYS_WAITING_MAX);
    std::thread::spawn(move || {
        let terminal = Term::stdout();
        loop {
            let key = match terminal.read_key() {
                Ok(key) => key,
                // Ctrl-C, which is a signal too.
                Err(error) if error.kind() == io::ErrorKind::Interrupted => Key::CtrlC,
                Err(_) => return,
            };
            if tell.blocking_send(key).is_err() {
                return;
            }
        }
    });
    pressed
}
