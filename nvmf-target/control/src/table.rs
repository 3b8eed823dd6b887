//! The table of methods: names, when each may be called, its parameters and what runs it. Dispatch, dry checks of a
//! configuration and the documentation all read this one table.

use std::collections::HashMap;
use std::fmt::Write as _;

use cryptfold_nvmf_auth::is_key_text;
use serde_json::{Map, Value};

use crate::Control;
use crate::jsonrpc::{RpcError, RpcResult};
use crate::params::{FromJson, Param, Params};
pub use crate::roles::Role;

/// When a method may be called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum When {
    /// Only before initialisation.
    Startup,
    /// Only after it.
    Runtime,
    /// Always.
    Any,
}

type Call = Box<dyn Fn(&Control, &Map<String, Value>) -> RpcResult + Send + Sync>;

/// One method.
pub struct Method {
    /// Its name.
    pub name: &'static str,
    /// Older names that lead here.
    pub aliases: &'static [&'static str],
    /// When it may be called.
    pub when: When,
    /// Who may call it.
    pub role: Role,
    /// What it does and replies; differences from SPDK.
    pub doc: &'static str,
    /// What it takes.
    pub params: Vec<Param>,
    /// Takes whatever it is given.
    pub any_params: bool,
    check: fn(&Map<String, Value>) -> Result<(), RpcError>,
    call: Call,
}

impl Method {
    /// Who may make this call of it.
    pub(crate) fn role_of(&self, params: Option<&Value>) -> Role {
        self.role.of_call(self.name, params)
    }

    /// A run-time method.
    pub fn new<P: Params + 'static>(
        name: &'static str,
        doc: &'static str,
        handler: impl Fn(&Control, P) -> RpcResult + Send + Sync + 'static,
    ) -> Method {
        Method {
            name,
            aliases: &[],
            when: When::Runtime,
            role: role_of(name),
            doc,
            params: P::table(),
            any_params: false,
            check: |given| P::decode(given).map(|_| ()).map_err(RpcError::from),
            call: Box::new(move |c, given| handler(c, P::decode(given)?)),
        }
    }

    /// A method without parameters.
    pub fn plain(name: &'static str, doc: &'static str, handler: fn(&Control) -> RpcResult) -> Method {
        Method {
            name,
            aliases: &[],
            when: When::Runtime,
            role: role_of(name),
            doc,
            params: Vec::new(),
            any_params: false,
            check: |_| Ok(()),
            call: Box::new(move |c, _| handler(c)),
        }
    }

    /// A method of SPDK that has nothing to set here: any parameters are taken, so that its configuration files load.
    pub fn accepted(name: &'static str, doc: &'static str) -> Method {
        Method {
            name,
            aliases: &[],
            when: When::Any,
            role: role_of(name),
            doc,
            params: Vec::new(),
            any_params: true,
            check: |_| Ok(()),
            call: Box::new(|_, _| Ok(Value::Bool(true))),
        }
    }

    /// Sets when it may be called.
    #[must_use]
    pub fn when(mut self, when: When) -> Method {
        self.when = when;
        self
    }

    /// Adds older names.
    #[must_use]
    pub fn aliases(mut self, aliases: &'static [&'static str]) -> Method {
        self.aliases = aliases;
        self
    }

    /// The parameters as an object, after the rules that hold for every method.
    fn given<'a>(&self, params: Option<&'a Value>) -> Result<Option<&'a Map<String, Value>>, RpcError> {
        let takes_none = self.params.is_empty() && !self.any_params;
        match params {
            None | Some(Value::Null) => Ok(None),
            Some(_) if takes_none => {
                Err(RpcError::params(format!("{} takes no parameters; leave \"params\" out", self.name)))
            }
            Some(Value::Object(o)) => Ok(Some(o)),
            Some(Value::Array(a)) if a.is_empty() => Ok(None),
            Some(_) => Err(RpcError::params("\"params\" must be an object of named parameters")),
        }
    }

    /// The parameters of a call as they may be written down: without secrets, and without what this method does not take.
    pub fn shown(&self, params: Option<&Value>) -> Value {
        match params.and_then(Value::as_object) {
            Some(given) if !self.any_params => shown(&self.params, given),
            _ => Value::Null,
        }
    }

    /// Whether a call with these parameters would get past decoding.
    ///
    /// # Errors
    /// What such a call would answer.
    pub fn check(&self, params: Option<&Value>) -> Result<(), RpcError> {
        match self.given(params)? {
            Some(o) => (self.check)(o),
            None => (self.check)(&Map::new()),
        }
    }
}

/// # Panics
/// When nobody has said who may call it: a bug of ours that every start would show.
fn role_of(name: &str) -> Role {
    Role::of(name).unwrap_or_else(|| panic!("method {name} has no role (roles.rs)"))
}

/// All methods.
pub struct Table {
    methods: Vec<Method>,
    names: HashMap<&'static str, usize>,
}

impl Table {
    /// From a list.
    ///
    /// # Panics
    /// When a name stands in it twice: a bug of ours that every start would show.
    pub fn new(methods: Vec<Method>) -> Table {
        let mut names = HashMap::new();
        for (i, m) in methods.iter().enumerate() {
            for n in std::iter::once(&m.name).chain(m.aliases) {
                assert!(names.insert(*n, i).is_none(), "method {n} is in the table twice");
            }
        }
        Table { methods, names }
    }

    /// All, in the order of the documentation.
    pub fn methods(&self) -> &[Method] {
        &self.methods
    }

    /// By name or alias.
    pub fn get(&self, name: &str) -> Option<&Method> {
        self.names.get(name).map(|i| &self.methods[*i])
    }

    /// By name or alias, or the error for an unknown one.
    ///
    /// # Errors
    /// -32601, with the nearest name.
    pub fn find(&self, name: &str) -> Result<&Method, RpcError> {
        self.get(name).ok_or_else(|| {
            let near = self.methods.iter().map(|m| m.name).min_by_key(|n| distance(n, name));
            let hint = match near {
                Some(n) if distance(n, name) <= 3 => format!("; did you mean {n}?"),
                _ => String::new(),
            };
            let shown: String = name.chars().take(80).collect();
            RpcError::new(RpcError::METHOD_NOT_FOUND, format!("Method not found: \"{shown}\"{hint}"))
        })
    }

    /// Decodes and runs.
    ///
    /// # Errors
    /// Unknown method, wrong state, bad parameters, or what the method says.
    pub fn call(&self, control: &Control, name: &str, params: Option<&Value>) -> RpcResult {
        let m = self.find(name)?;
        let started = control.is_initialized();
        if (m.when == When::Startup && started) || (m.when == When::Runtime && !started) {
            let say = if started { "before framework_start_init" } else { "after framework_start_init" };
            return Err(RpcError::new(
                RpcError::INVALID_STATE,
                format!("Method {name} may only be called {say} (see rpc_get_methods with \"current\")"),
            ));
        }
        let empty = Map::new();
        let given = m.given(params)?.unwrap_or(&empty);
        (m.call)(control, given)
    }

    /// The documentation's table, as Markdown.
    pub fn markdown(&self) -> String {
        let mut s = String::from(HEAD);
        for m in &self.methods {
            let _ = writeln!(s, "\n### {}\n\n{}", m.name, m.doc);
            let when = match m.when {
                When::Startup => " Only before initialisation.",
                When::Runtime => "",
                When::Any => " Also before initialisation.",
            };
            let _ = writeln!(s, "\n*Role: {}.{when}*", m.role);
            if !m.aliases.is_empty() {
                let _ = writeln!(s, "\nAliases: {}.", m.aliases.join(", "));
            }
            if m.any_params {
                let _ = writeln!(s, "\nTakes any parameters.");
            } else if !m.params.is_empty() {
                s.push_str("\n| parameter | | what |\n|---|---|---|\n");
                rows(&mut s, "", &m.params);
            }
        }
        s
    }
}

const HEAD: &str = "# JSON-RPC methods\n\n\
<!-- Generated by `cryptfold rpc --doc`; a test compares it with the code. -->\n\n\
Names, parameters and replies are SPDK's where SPDK has the method; each method says where it differs. \
Parameters in **bold** are required. An unknown, missing or unacceptable parameter is answered with -32602 \
\"Invalid parameters: ...\".\n\n\
Root and the target's own user may call everything. Others need a role (`cryptfold target --role ROLE=uid:NUMBER` or \
`ROLE=gid:NUMBER`): *viewer* reads, *operator* changes storage, network and the program, *security* makes, opens, changes and \
destroys keys; the last two read, too. A call without its role is answered with -1 \"... Operation not permitted\", and is in the \
audit log.\n";

fn rows(s: &mut String, prefix: &str, params: &[Param]) {
    for p in params {
        let name = format!("{prefix}{}", p.name);
        let name = if p.required { format!("**{name}**") } else { name };
        let default = p.default.as_ref().map(|d| format!("; default {d}")).unwrap_or_default();
        let _ = writeln!(s, "| {name} | {}{default} | {} |", p.kind.replace('|', "\\|"), p.doc);
        rows(s, &format!("{prefix}{}.", p.name), &p.members);
    }
}

/// See [`Method::shown`].
fn shown(params: &[Param], given: &Map<String, Value>) -> Value {
    let one = |p: &Param, v: &Value| match v {
        Value::Null => Value::Null,
        _ if p.secret => "(secret)".into(),
        // Whole configurations: their calls are written down one by one.
        _ if p.kind == <Value as FromJson>::kind() => "(not shown)".into(),
        Value::Object(inner) => shown(&p.members, inner),
        // Where a key's name is wanted, the key itself may be given by mistake.
        Value::String(s) if is_key_text(s) => "(secret)".into(),
        v if v.to_string().len() > SHOWN_BYTES => "(long)".into(),
        v => v.clone(),
    };
    let known = params.iter().filter_map(|p| given.get(p.name).map(|v| (p.name.to_owned(), one(p, v))));
    known.collect::<Map<_, _>>().into()
}

/// Longest value that is written down.
const SHOWN_BYTES: usize = 1024;

/// Levenshtein distance, for suggestions.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().take(80).collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, ca) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, cb) in b.iter().enumerate() {
            let substituted = diagonal + usize::from(ca != *cb);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distances() {
        assert_eq!(distance("bdev", "bdev"), 0);
        assert_eq!(distance("bdev_get_bdevs", "bdev_get_bdev"), 1);
        assert_eq!(distance("abc", "xyz"), 3);
    }
}
