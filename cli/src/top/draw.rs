//! How `stoke top` looks: one frame of what the model knows. Changes nothing.

use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Block, Cell, Clear, Paragraph, Row, Table, TableState, Wrap};
use stoke_protocol::message::client::{ClusterEvent, Explanation, JobState, JobView, NodeState, NodeView};

use super::model::{Model, Pane};
use crate::{json, output};

const BAR_WIDTH: usize = 8;
const SPARKS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
const SPARKS_WIDTH: usize = 20;

const HELP: [&str; 8] = [
    "tab, shift-tab    the next, the previous pane",
    "up, down          a line; page up, page down: ten",
    "home, end         the first, the last line",
    "enter             the job of this line",
    "esc               back",
    "?                 this",
    "q                 the end",
    "stoke dashboard   the same in a browser, with curves and logs",
];

pub fn draw(frame: &mut Frame<'_>, model: &Model) {
    let nodes = (model.nodes.len() as u16 + 3).min(frame.area().height / 3).max(4);
    let [top, first, second, third, bottom] = Layout::vertical([
        Constraint::Length(1),
        Constraint::Length(nodes),
        Constraint::Min(4),
        Constraint::Percentage(30),
        Constraint::Length(1),
    ])
    .areas(frame.area());
    frame.render_widget(headline(model), top);
    if let Some(detail) = &model.detail {
        let page = Rect { height: first.height + second.height + third.height, ..first };
        job_page(frame, page, detail, model.curves.get(&detail.job.job).map(Vec::as_slice).unwrap_or_default());
    } else {
        nodes_pane(frame, first, model);
        jobs_pane(frame, second, model);
        events_pane(frame, third, model);
    }
    let keys = "q end   tab pane   arrows line   enter job   esc back   ? help";
    frame.render_widget(Paragraph::new(keys).style(Style::new().add_modifier(Modifier::DIM)), bottom);
    if model.helps {
        help(frame);
    }
}

fn headline(model: &Model) -> Line<'static> {
    if let Some(why) = &model.away {
        let words = format!("{why}: asked again every second; running jobs go on");
        return Line::styled(words, Style::new().fg(Color::Red).add_modifier(Modifier::BOLD));
    }
    let Some(pulse) = &model.pulse else { return Line::raw("looking …") };
    let slow = if pulse.ranks_slow > 0 {
        format!(", {} slow", output::count(pulse.ranks_slow, "rank"))
    } else {
        String::new()
    };
    Line::raw(format!(
        "stoke {}  {} of {} up  {} running, {} waiting{slow}  {}",
        pulse.version,
        pulse.nodes_up,
        output::count(pulse.nodes, "node"),
        output::count(pulse.jobs_running, "job"),
        pulse.jobs_queued,
        pulse.you,
    ))
}

fn pane(frame: &mut Frame<'_>, area: Rect, model: &Model, pane: Pane, table: Table<'_>, title: &str) {
    let is_here = model.pane == pane;
    let style = if is_here { Style::new().add_modifier(Modifier::BOLD) } else { Style::new() };
    let block = Block::bordered().title(Span::styled(title.to_owned(), style));
    let shown = Style::new().add_modifier(Modifier::REVERSED);
    let table = table.block(block).row_highlight_style(if is_here { shown } else { Style::new() });
    let mut state = TableState::default().with_selected(Some(model.selected[pane as usize]));
    frame.render_stateful_widget(table, area, &mut state);
}

fn heading<const N: usize>(words: [&'static str; N]) -> Row<'static> {
    Row::new(words).style(Style::new().add_modifier(Modifier::DIM))
}

fn nodes_pane(frame: &mut Frame<'_>, area: Rect, model: &Model) {
    let widths = [
        Constraint::Length(9),
        Constraint::Length(12),
        Constraint::Length(11),
        Constraint::Length(14),
        Constraint::Length(26),
        Constraint::Length(5),
        Constraint::Length(20),
        Constraint::Min(6),
    ];
    let table = Table::new(model.nodes.iter().map(node_row), widths);
    let table = table.header(heading(["NODE", "NAME", "STATE", "CPU", "MEMORY", "HEAT", "GPUS", "RANKS"]));
    pane(frame, area, model, Pane::Nodes, table, " Nodes ");
}

fn node_row(node: &NodeView) -> Row<'static> {
    let told = node.state != NodeState::Lost && node.memory_used_bytes > 0;
    let memory = node.memory_used_bytes as f32 / node.capacity.memory_bytes.max(1) as f32;
    let gpus = node.capacity.gpus.iter().zip(node.heat.gpus);
    let gpus: Vec<String> = gpus.map(|(_, heat)| heat.map_or("-".into(), |heat| bar(heat.busy, 4))).collect();
    let style = match node.state {
        NodeState::Up => Style::new(),
        NodeState::Draining | NodeState::Drained => Style::new().fg(Color::Yellow),
        NodeState::Silent | NodeState::Lost | NodeState::Quarantined => Style::new().fg(Color::Red),
    };
    let ranks: Vec<String> = node.ranks.iter().map(|(job, rank)| format!("{job}/{}", rank.0)).collect();
    Row::new([
        node.node.to_string(),
        node.name.clone(),
        json::node_state(node.state).to_owned(),
        if told { bar(node.cpu_load, BAR_WIDTH) } else { "-".into() },
        if told {
            format!("{} of {}", bar(memory, BAR_WIDTH), output::bytes(node.capacity.memory_bytes))
        } else {
            "-".into()
        },
        node.heat.temperature_c.map_or("-".into(), |degrees| format!("{degrees:.0}°C")),
        if gpus.is_empty() { "-".into() } else { gpus.join(" ") },
        if ranks.is_empty() { "-".into() } else { ranks.join(" ") },
    ])
    .style(style)
}

fn jobs_pane(frame: &mut Frame<'_>, area: Rect, model: &Model) {
    let widths = [
        Constraint::Length(8),
        Constraint::Length(16),
        Constraint::Length(10),
        Constraint::Length(5),
        Constraint::Length(34),
        Constraint::Length(16),
        Constraint::Min(SPARKS_WIDTH as u16),
    ];
    let row = |job: &JobView| job_row(job, model.curves.get(&job.job).map(Vec::as_slice).unwrap_or_default());
    let table = Table::new(model.jobs.iter().map(row), widths);
    let table = table.header(heading(["JOB", "NAME", "STATE", "RANKS", "PROGRESS", "RESULT", "CURVE, OR WHY"]));
    pane(frame, area, model, Pane::Jobs, table, " Jobs ");
}

fn job_row(job: &JobView, curve: &[f32]) -> Row<'static> {
    let why = if job.reason.is_empty() { sparks(curve, SPARKS_WIDTH) } else { job.reason.clone() };
    let cells = [
        job.job.to_string(),
        job.name.clone(),
        json::job_state(job.state).to_owned(),
        job.world_sizes.last().map_or("-".into(), ToString::to_string),
        progress(job),
        result(job),
        why,
    ];
    Row::new(cells.map(Cell::from)).style(Style::new().fg(colour(job.state)))
}

fn colour(state: JobState) -> Color {
    match state {
        JobState::Running | JobState::Starting => Color::Reset,
        JobState::Queued | JobState::Recovering | JobState::Cancelling => Color::Yellow,
        JobState::Succeeded => Color::Green,
        JobState::Failed => Color::Red,
        JobState::Cancelled => Color::DarkGray,
    }
}

fn progress(job: &JobView) -> String {
    match (&job.outcome, &job.progress) {
        (Some(outcome), _) => format!("step {}", outcome.step.0),
        (None, Some(progress)) if progress.steps.0 > 0 => {
            let part = progress.step.0 as f32 / progress.steps.0 as f32;
            format!("{} {}/{}", bar(part, BAR_WIDTH), progress.step.0, progress.steps.0)
        }
        (None, _) => "-".into(),
    }
}

/// The figure that people look for first.
fn result(job: &JobView) -> String {
    let returned = job.progress.and_then(|progress| progress.rl).and_then(|rl| rl.episode_return);
    let load = job.serves.as_ref().and_then(|serves| serves.load.as_ref());
    match (returned, load, &job.outcome, &job.progress) {
        _ if job.exec.is_some() => "-".into(),
        (Some(value), ..) => format!("return {value:.1}"),
        (None, Some(load), ..) => format!("{:.1} tokens/s", load.tokens_per_second),
        (None, None, Some(outcome), _) => format!("loss {:.4}", outcome.loss),
        (None, None, None, Some(progress)) => format!("loss {:.4}", progress.loss),
        (None, None, None, None) => "-".into(),
    }
}

fn events_pane(frame: &mut Frame<'_>, area: Rect, model: &Model) {
    let widths = [Constraint::Length(9), Constraint::Length(9), Constraint::Min(20)];
    let table = Table::new(model.events.iter().rev().map(event_row), widths);
    pane(frame, area, model, Pane::Events, table, " Events ");
}

fn event_row(event: &ClusterEvent) -> Row<'static> {
    let of = event.job.map(|job| job.to_string()).or(event.node.map(|node| node.to_string()));
    let style = if event.grave { Style::new().fg(Color::Red) } else { Style::new() };
    let mark = if event.grave { "! " } else { "" };
    Row::new([clock(event.at_ms), of.unwrap_or_else(|| "cluster".into()), format!("{mark}{}", event.text)]).style(style)
}

/// Of the day, in UTC.
fn clock(ms: u64) -> String {
    output::moment(ms).get(11..19).unwrap_or_default().to_owned()
}

fn job_page(frame: &mut Frame<'_>, area: Rect, told: &Explanation, curve: &[f32]) {
    let job = &told.job;
    let placed: Vec<String> = job.placement.iter().map(|(rank, node)| format!("{rank} on {node}")).collect();
    let worlds: Vec<String> = job.world_sizes.iter().map(ToString::to_string).collect();
    let mut lines = vec![
        Line::raw(format!("{}  {}  of {}", json::job_state(job.state), progress(job), job.owner)),
        Line::raw(format!("{}  {}", result(job), sparks(curve, usize::from(area.width.saturating_sub(30))))),
        Line::raw(format!("{}  world sizes {}  recoveries {}", job.generation, worlds.join(" "), job.recoveries)),
        Line::raw(placed.join(", ")),
    ];
    if !job.reason.is_empty() {
        lines.push(Line::styled(format!("why: {}", job.reason), Style::new().fg(colour(job.state))));
    }
    lines.extend(told.nodes.iter().map(|(node, reason)| Line::raw(format!("  {node}: {reason}"))));
    if let Some(checkpoint) = &job.checkpoint {
        lines.push(Line::raw(format!("checkpoint at {}: {}", checkpoint.step, checkpoint.uri)));
    }
    lines.push(Line::default());
    lines.extend(told.events.iter().rev().map(|event| Line::raw(format!("{}  {}", clock(event.at_ms), event.text))));
    let block = Block::bordered().title(format!(" {} {} ", job.job, job.name));
    frame.render_widget(Paragraph::new(lines).block(block).wrap(Wrap { trim: false }), area);
}

fn help(frame: &mut Frame<'_>) {
    let all = frame.area();
    let (width, height) = (all.width.min(66), all.height.min(HELP.len() as u16 + 2));
    let area = Rect { x: (all.width - width) / 2, y: (all.height - height) / 2, width, height };
    frame.render_widget(Clear, area);
    frame.render_widget(Paragraph::new(HELP.map(Line::raw).to_vec()).block(Block::bordered().title(" Keys ")), area);
}

/// `████░░░░ 52%`
fn bar(part: f32, width: usize) -> String {
    let part = if part.is_finite() { part.clamp(0.0, 1.0) } else { 0.0 };
    let full = (part * width as f32).round() as usize;
    format!("{}{} {:>2.0}%", "█".repeat(full), "░".repeat(width - full), part * 100.0)
}

/// A curve in one line: means of as many parts as there is room for, from the least to the greatest.
fn sparks(curve: &[f32], width: usize) -> String {
    let values: Vec<f32> = curve.iter().copied().filter(|value| value.is_finite()).collect();
    let parts = values.len().min(width);
    let part = |at: usize| &values[at * values.len() / parts..(at + 1) * values.len() / parts];
    let means: Vec<f32> = (0..parts).map(part).map(|part| part.iter().sum::<f32>() / part.len() as f32).collect();
    let (low, high) = means.iter().fold((f32::MAX, f32::MIN), |(low, high), mean| (low.min(*mean), high.max(*mean)));
    let level = |mean: &f32| if high > low { ((mean - low) / (high - low) * 7.0).round() as usize } else { 0 };
    means.iter().map(|mean| SPARKS[level(mean).min(7)]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bars_and_curves_have_their_width_whatever_the_values_are() {
        assert_eq!(
            (bar(0.5, 4), bar(7.0, 4), bar(f32::NAN, 2)),
            ("██░░ 50%".into(), "████ 100%".into(), "░░  0%".into())
        );
        assert_eq!(sparks(&[], 8), "");
        assert_eq!(sparks(&[1.0, 1.0], 8), "▁▁");
        assert_eq!(sparks(&[3.0, 2.0, f32::NAN, 1.0], 8), "█▅▁");
        let long: Vec<f32> = (0..512).map(|at| at as f32).collect();
        assert_eq!(sparks(&long, 20).chars().count(), 20);
    }
}
