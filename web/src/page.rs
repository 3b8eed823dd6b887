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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_file_is_served_and_keeps_the_rules() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/page");
        let names = std::fs::read_dir(folder)
            .expect("the page's folder")
            .map(|entry| entry.expect("an entry").file_name().into_string().expect("a name in UTF-8"));
        let names: Vec<String> = names.collect();
        assert_eq!(names.len(), FILES.len(), "{names:?}");
        for name in names {
            let path = if name == "index.html" { "/".to_owned() } else { format!("/{name}") };
            let file = find(&path).unwrap_or_else(|| panic!("{path} is not served"));
            let text = std::str::from_utf8(file.body).expect("UTF-8").replace("http://www.w3.org/", "");
            // Text from elsewhere never becomes markup; nothing is fetched from elsewhere; content security forbids the rest.
            for taboo in [
                "innerHTML",
                "outerHTML",
                "insertAdjacentHTML",
                "eval(",
                "http://",
                "https://",
                " style=\"",
                " onclick=",
            ] {
                assert!(!text.contains(taboo), "{name} has {taboo}");
            }
        }
        assert!(find("/../src/page.rs").is_none());
    }
}
