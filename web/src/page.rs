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

/// All of them.
pub const FILES: &[File] = &[
    File { path: "/", content_type: "text/html; charset=utf-8", body: include_bytes!("../page/index.html") },
    File {
        path: "/style.css",
        content_type: "text/css; charset=utf-8",
        body: include_bytes!("../page/style.css"),
    },
    File {
        path: "/app.js",
        content_type: "text/javascript; charset=utf-8",
        body: include_bytes!("../page/app.js"),
    },
];

/// By the path of a request.
pub fn find(path: &str) -> Option<&'static File> {
    FILES.iter().find(|f| f.path == path)
}
