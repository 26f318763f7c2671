//! Curves as a picture (SVG), a panel for each. Owns how they look; knows nothing of jobs.

use plotters::prelude::*;

const WIDTH: u32 = 900;
const PANEL_HEIGHT: u32 = 240;
const TITLE_HEIGHT: u32 = 40;
/// Points whose mean the strong line shows.
const WINDOW: usize = 20;

pub struct Panel<'a> {
    pub name: &'a str,
    /// From left to right, all finite.
    pub points: Vec<(f64, f64)>,
}

/// The points thin, and their moving mean strong.
pub fn draw(title: &str, x_name: &str, panels: &[Panel<'_>]) -> anyhow::Result<String> {
    let mut picture = String::new();
    {
        let height = TITLE_HEIGHT + PANEL_HEIGHT * panels.len() as u32;
        let area = SVGBackend::with_string(&mut picture, (WIDTH, height)).into_drawing_area();
        area.fill(&WHITE)?;
        let area = area.titled(title, ("sans-serif", 20))?;
        let right = panels.iter().flat_map(|panel| &panel.points).fold(1.0, |right: f64, (x, _)| right.max(*x));
        for (panel, area) in panels.iter().zip(area.split_evenly((panels.len().max(1), 1))) {
            let (low, high) = bounds(&panel.points);
            let mut chart = ChartBuilder::on(&area)
                .margin(8)
                .caption(panel.name, ("sans-serif", 15))
                .x_label_area_size(36)
                .y_label_area_size(64)
                .build_cartesian_2d(0.0..right, low..high)?;
            chart
                .configure_mesh()
                .x_desc(x_name)
                .light_line_style(BLACK.mix(0.04))
                .bold_line_style(BLACK.mix(0.12))
                .x_label_formatter(&|value| short(*value))
                .y_label_formatter(&|value| short(*value))
                .draw()?;
            let thin = LineSeries::new(panel.points.iter().copied(), BLUE.mix(0.25).stroke_width(1));
            chart.draw_series(thin)?;
            let strong = LineSeries::new(smooth(&panel.points), BLUE.stroke_width(2));
            chart.draw_series(strong)?;
        }
        area.present()?;
    }
    Ok(picture)
}

/// Mean of each point and those before it.
fn smooth(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let window = |at: usize| &points[(at + 1).saturating_sub(WINDOW)..=at];
    let mean = |window: &[(f64, f64)]| window.iter().map(|(_, value)| value).sum::<f64>() / window.len() as f64;
    points.iter().enumerate().map(|(at, (x, _))| (*x, mean(window(at)))).collect()
}

/// A little more than what is shown; some height also where all values are one.
fn bounds(points: &[(f64, f64)]) -> (f64, f64) {
    let values = points.iter().map(|(_, value)| *value);
    let (low, high) =
        values.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), value| (low.min(value), high.max(value)));
    if !(low.is_finite() && high.is_finite()) {
        return (0.0, 1.0);
    }
    let spare = ((high - low) * 0.05).max(high.abs().max(low.abs()) * 1e-3).max(1e-6);
    (low - spare, high + spare)
}

/// `1.5k`, `0.012`.
fn short(value: f64) -> String {
    let size = value.abs();
    let trimmed = |value: f64, unit: &str| format!("{}{unit}", (value * 100.0).round() / 100.0);
    match size {
        _ if size >= 1e6 => trimmed(value / 1e6, "M"),
        _ if size >= 1e3 => trimmed(value / 1e3, "k"),
        _ if size >= 0.1 || size == 0.0 => trimmed(value, ""),
        _ => format!("{value:.1e}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_picture_has_a_panel_for_each_curve_whatever_its_values_are() {
        let points = |value: &dyn Fn(u32) -> f64| (0..50).map(|at| (f64::from(at) * 512.0, value(at))).collect();
        let panels = [
            Panel { name: "episode_return", points: points(&|at| f64::from(at) * 10.0) },
            Panel { name: "the_same", points: points(&|_| 3.0) },
            Panel { name: "nothing", points: Vec::new() },
        ];
        let picture = draw("a job", "environment steps", &panels).expect("a picture");
        assert!(picture.starts_with("<svg") && picture.trim_end().ends_with("</svg>"));
        for name in ["a job", "episode_return", "the_same", "nothing", "environment steps"] {
            assert!(picture.contains(name), "{name}");
        }
        assert_eq!(smooth(&[(0.0, 1.0), (1.0, 3.0)]), [(0.0, 1.0), (1.0, 2.0)]);
        assert_eq!([1_500.0, 0.0, 0.012, 2e6, 0.25].map(short), ["1.5k", "0", "1.2e-2", "2M", "0.25"]);
    }
}
