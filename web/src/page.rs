//! The page's files, part of the program. They hold nothing of the target, so nobody is asked for a token.

/// One file.
#[derive(Clone, Copy, Debug)]
pub struct File {
    /// Where it is served.
    pub path: &'static str,
    /// What it is.
    pub content_type: &'static str,
    /// What is in it.
    pub body: &'static [u8],
}

const SCRIPT: &str = "text/javascript; charset=utf-8";

macro_rules! file {
    ($path:literal, $content_type:expr, $file:literal) => {
        File { path: $path, content_type: $content_type, body: include_bytes!(concat!("../page/", $file)) }
    };
}

/// All of them.
pub const FILES: &[File] = &[
    file!("/", "text/html; charset=utf-8", "index.html"),
    file!("/style.css", "text/css; charset=utf-8", "style.css"),
    file!("/icon.svg", "image/svg+xml", "icon.svg"),
    file!("/theme.js", SCRIPT, "theme.js"),
    file!("/app.js", SCRIPT, "app.js"),
    file!("/charts.js", SCRIPT, "charts.js"),
    file!("/dom.js", SCRIPT, "dom.js"),
    file!("/feed.js", SCRIPT, "feed.js"),
    file!("/sections.js", SCRIPT, "sections.js"),
    file!("/stack.js", SCRIPT, "stack.js"),
    file!("/table.js", SCRIPT, "table.js"),
    file!("/units.js", SCRIPT, "units.js"),
];

/// By the path of a request.
pub fn find(path: &str) -> Option<&'static File> {
    FILES.iter().find(|f| f.path == path)
}
