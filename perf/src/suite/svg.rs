//! Charts as inline SVG: their colours come from the page's style, so that they follow light, dark and print.

use std::fmt::Write;

/// Text for HTML and SVG.
pub fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out += "&amp;",
            '<' => out += "&lt;",
            '>' => out += "&gt;",
            '"' => out += "&quot;",
            c => out.push(c),
        }
    }
    out
}

/// A number for people: three digits and a prefix.
pub fn short(x: f64) -> String {
    let (mut n, mut unit) = (x, 0);
    while n.abs() >= 1000.0 && unit < 4 {
        n /= 1000.0;
        unit += 1;
    }
    let digits = match n.abs() {
        n if n >= 100.0 || n == 0.0 => 0,
        n if n >= 10.0 => 1,
        _ => 2,
    };
    format!("{n:.digits$}{}", ["", " k", " M", " G", " T"][unit])
}

const WIDTH: f64 = 860.0;
/// Where the labels end.
const LEFT: f64 = 300.0;
/// Room for the values on the right.
const RIGHT: f64 = 90.0;
const BAR: f64 = 16.0;

/// A bar: its class (colour), value and range.
pub struct Bar {
    /// Class of the style.
    pub class: &'static str,
    /// What it shows; several are stacked.
    pub values: Vec<(&'static str, f64)>,
    /// Whisker.
    pub range: Option<(f64, f64)>,
    /// A mark across the bar.
    pub mark: Option<f64>,
    /// At its end.
    pub text: String,
}

/// A row of bars with one label.
pub struct Group {
    /// On the left.
    pub label: String,
    /// From above.
    pub bars: Vec<Bar>,
}

/// Horizontal bars; `title` is for who can not see them.
pub fn bars(title: &str, groups: &[Group]) -> String {
    let longest = |b: &Bar| {
        let sum: f64 = b.values.iter().map(|v| v.1).sum();
        sum.max(b.range.map_or(0.0, |r| r.1)).max(b.mark.unwrap_or(0.0))
    };
    let top = groups.iter().flat_map(|g| &g.bars).map(longest).fold(0.0, f64::max).max(1e-9);
    let scale = (WIDTH - LEFT - RIGHT) / top;
    let mut body = String::new();
    let mut y = 4.0;
    for group in groups {
        let middle = y + BAR * group.bars.len() as f64 / 2.0 + 4.0;
        // Writing to a String can not fail.
        let _ = write!(
            body,
            "<text x='{}' y='{middle:.1}' text-anchor='end'>{}</text>",
            LEFT - 8.0,
            escape(&group.label)
        );
        for bar in &group.bars {
            let mut x = LEFT;
            for (class, value) in &bar.values {
                let width = (value * scale).max(0.0);
                let class = if class.is_empty() { bar.class } else { class };
                let _ = write!(
                    body,
                    "<rect class='{class}' x='{x:.1}' y='{:.1}' width='{width:.1}' height='{}'/>",
                    y + 1.0,
                    BAR - 2.0
                );
                x += width;
            }
            let middle = y + BAR / 2.0;
            if let Some((low, high)) = bar.range {
                let (a, b) = (LEFT + low * scale, LEFT + high * scale);
                let _ = write!(
                    body,
                    "<path class='whisker' d='M{a:.1} {middle:.1}H{b:.1}M{a:.1} {0:.1}v6M{b:.1} {0:.1}v6'/>",
                    middle - 3.0
                );
                x = x.max(b);
            }
            if let Some(mark) = bar.mark {
                let at = LEFT + mark * scale;
                let _ = write!(body, "<path class='mark' d='M{at:.1} {y:.1}v{BAR}'/>");
                // The bar's own figure stays at its bar, unless the mark would go through it.
                if (x..x + RIGHT).contains(&at) {
                    x = at;
                }
            }
            let _ = write!(
                body,
                "<text class='value' x='{:.1}' y='{:.1}'>{}</text>",
                x + 5.0,
                middle + 4.0,
                escape(&bar.text)
            );
            y += BAR;
        }
        y += 8.0;
    }
    frame(title, y, &body)
}

/// A point of a latency chart: percentiles with their range.
pub struct Points {
    /// On the left.
    pub label: String,
    /// Class, (lowest, median, highest).
    pub points: Vec<(&'static str, (f64, f64, f64))>,
}

/// Points with ranges over a logarithmic scale.
pub fn latencies(title: &str, rows: &[Points]) -> String {
    let all = || rows.iter().flat_map(|r| &r.points).map(|p| p.1).filter(|p| p.0 > 0.0);
    let low = all().map(|p| p.0).fold(f64::MAX, f64::min).clamp(1e-3, 1e9).log10().floor();
    let high = all().map(|p| p.2).fold(0.0, f64::max).clamp(1e-2, 1e12).log10().ceil().max(low + 1.0);
    let place = |us: f64| LEFT + (us.max(1e-3).log10() - low) / (high - low) * (WIDTH - LEFT - 30.0);
    let height = 24.0 + rows.len() as f64 * 20.0;
    let mut body = String::new();
    for decade in low as i32..=high as i32 {
        let us = 10f64.powi(decade);
        let x = place(us);
        let text = if us >= 1000.0 { format!("{} ms", us / 1000.0) } else { format!("{us} us") };
        let _ = write!(
            body,
            "<path class='grid' d='M{x:.1} 16V{height}'/><text class='value' x='{x:.1}' y='11' text-anchor='middle'>{text}</text>"
        );
    }
    for (n, row) in rows.iter().enumerate() {
        let y = 30.0 + n as f64 * 20.0;
        let _ = write!(
            body,
            "<text x='{}' y='{:.1}' text-anchor='end'>{}</text>",
            LEFT - 8.0,
            y + 4.0,
            escape(&row.label)
        );
        for (class, (low, median, high)) in &row.points {
            let (a, m, b) = (place(*low), place(*median), place(*high));
            let _ = write!(
                body,
                "<path class='whisker' d='M{a:.1} {y}H{b:.1}'/><circle class='{class}' cx='{m:.1}' cy='{y}' r='5'>\
                 <title>{} us ({} to {})</title></circle>",
                short(*median),
                short(*low),
                short(*high)
            );
        }
    }
    frame(title, height + 8.0, &body)
}

fn frame(title: &str, height: f64, body: &str) -> String {
    let title = escape(title);
    format!(
        "<svg viewBox='0 0 {WIDTH} {height:.0}' role='img' aria-label=\"{title}\"><title>{title}</title>{body}</svg>\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_texts() {
        assert_eq!(
            [short(0.0), short(5.123), short(48.26), short(629_000.0)],
            ["0", "5.12", "48.3", "629 k"]
        );
        assert_eq!(escape("<a b=\"c\">&"), "&lt;a b=&quot;c&quot;&gt;&amp;");
    }

    #[test]
    fn the_longest_bar_fills_the_chart() {
        let bar = |value, mark| Bar {
            class: "ours",
            values: vec![("", value)],
            range: None,
            mark,
            text: String::new(),
        };
        let groups = [Group { label: "a<b".into(), bars: vec![bar(50.0, None), bar(25.0, Some(100.0))] }];
        let svg = bars("t", &groups);
        let full = WIDTH - LEFT - RIGHT;
        assert!(svg.contains(&format!("width='{:.1}'", full / 2.0)), "half of the mark: {svg}");
        assert!(svg.contains(&format!("width='{:.1}'", full / 4.0)) && svg.contains("a&lt;b"));
    }

    #[test]
    fn decades_of_latencies() {
        let row = Points {
            label: "x".into(),
            points: vec![("p50", (9.0, 12.0, 20.0)), ("p99", (100.0, 900.0, 2000.0))],
        };
        let svg = latencies("t", &[row]);
        for label in [">1 us<", ">10 us<", ">100 us<", ">1 ms<", ">10 ms<"] {
            assert!(svg.contains(label), "{label}: {svg}");
        }
        assert!(!latencies("none", &[]).contains("NaN"));
    }
}
