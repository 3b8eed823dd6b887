//! Where the fields of the fixed structures lie, as the compiler has it, compared with what `docs/format.md` says of them.
//!
//! A table of that document that belongs to a structure stands below a line `<!-- layout: NAME, BYTES bytes -->`; its
//! first three columns are offset, bytes and field. The structures are private to their modules, so each of these lists
//! its own with [`layout!`]; a field that is left out is a gap, which fails too.

/// A structure's name in the document, its bytes, and per field: name, offset, bytes.
pub(crate) struct Layout {
    pub name: &'static str,
    pub bytes: usize,
    pub fields: Vec<(&'static str, usize, usize)>,
}

/// Bytes of a field, from a function that gives it.
pub(crate) fn field_bytes<T, F>(_: fn(&T) -> &F) -> usize {
    size_of::<F>()
}

/// `layout!("name", Type { field field ... })`
macro_rules! layout {
    ($name:literal, $raw:ty { $($field:ident)* }) => {
        $crate::layout::Layout {
            name: $name,
            bytes: size_of::<$raw>(),
            fields: vec![$((
                stringify!($field),
                std::mem::offset_of!($raw, $field),
                $crate::layout::field_bytes(|raw: &$raw| &raw.$field),
            )),*],
        }
    };
}
pub(crate) use layout;

#[cfg(test)]
mod tests {
    use super::Layout;

    const DOCUMENT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../../docs/format.md");

    fn all() -> Vec<Layout> {
        use crate::*;
        [
            block::layouts(),
            superblock::layouts(),
            slots::layouts(),
            owner::layouts(),
            segment::layouts(),
            fragment::layouts(),
            node::layouts(),
            map::layouts(),
            segtable::layouts(),
            journal::layouts(),
            entry::layouts(),
        ]
        .into_iter()
        .flatten()
        .collect()
    }

    /// Field, offset, bytes.
    type Row = (String, usize, usize);

    /// The rows below the marker of each structure.
    fn documented(text: &str) -> Vec<(String, Vec<Row>)> {
        let mut found: Vec<(String, Vec<Row>)> = Vec::new();
        let mut inside = false;
        for line in text.lines() {
            if let Some(marker) =
                line.strip_prefix("<!-- layout: ").and_then(|rest| rest.strip_suffix(" -->"))
            {
                found.push((marker.to_owned(), Vec::new()));
                inside = true;
                continue;
            }
            let cells: Vec<&str> = line.trim_matches('|').split('|').map(str::trim).collect();
            let row = match cells.as_slice() {
                [offset, bytes, field, ..] if line.starts_with('|') => offset
                    .parse()
                    .ok()
                    .zip(bytes.parse().ok())
                    .map(|(o, b)| (field.trim_matches('`').to_owned(), o, b)),
                _ => None,
            };
            match (row, found.last_mut()) {
                (Some(row), Some((_, rows))) if inside => rows.push(row),
                _ => inside &= line.is_empty() || line.starts_with('|'),
            }
        }
        found
    }

    #[test]
    fn the_document_says_where_fields_lie() {
        let text = std::fs::read_to_string(DOCUMENT).unwrap_or_else(|e| panic!("{DOCUMENT}: {e}"));
        let mut documented = documented(&text);
        for layout in all() {
            let mut end = 0;
            for (field, offset, bytes) in &layout.fields {
                assert_eq!(*offset, end, "{}: a field before {field} is not listed", layout.name);
                end = offset + bytes;
            }
            assert_eq!(end, layout.bytes, "{}: the last fields are not listed", layout.name);
            let marker = format!("{}, {} bytes", layout.name, layout.bytes);
            let at = documented.iter().position(|(name, _)| *name == marker);
            let at = at.unwrap_or_else(|| panic!("docs/format.md has no table <!-- layout: {marker} -->"));
            let (_, rows) = documented.swap_remove(at);
            let fields: Vec<Row> = layout.fields.iter().map(|(f, o, b)| (f.to_string(), *o, *b)).collect();
            assert_eq!(rows, fields, "{}: the document (left) and the code (right)", layout.name);
        }
        let left: Vec<_> = documented.iter().map(|(name, _)| name).collect();
        assert!(left.is_empty(), "docs/format.md describes what the code does not have: {left:?}");
    }
}
