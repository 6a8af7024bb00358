//! JSON files, read key by key: every fault names the key and says what is there instead.

use std::path::Path;

use serde_json::{Map, Value};

use super::{fault_in, io_error};
use crate::error::{Error, Result};
use crate::files::{fault, quoted};

/// Largest JSON file that is read, in bytes.
const MAX_JSON: u64 = 100_000_000;

/// No size may be larger, so that no product of two sizes overflows.
const LARGEST: f64 = (1_u64 << 31) as f64;

/// The JSON file at `path`.
pub(super) fn read<J: for<'de> serde::Deserialize<'de>>(path: &Path) -> Result<J> {
    let metadata = std::fs::metadata(path).map_err(|error| io_error(path, &error))?;
    if !metadata.is_file() || metadata.len() > MAX_JSON {
        let got = if metadata.is_file() {
            format!("{} bytes", metadata.len())
        } else {
            "something else".to_owned()
        };
        return Err(fault(path.display(), format!("a file of at most {MAX_JSON} bytes"), got));
    }
    let text = std::fs::read(path).map_err(|error| io_error(path, &error))?;
    serde_json::from_slice(&text).map_err(|error| fault(path.display(), "the expected JSON", error))
}

/// One object of a JSON file. Keys whose value is null count as absent, but for
/// [`says_none`](Self::says_none).
#[derive(Debug, Clone, Copy)]
pub(super) struct Object<'a> {
    pub(super) path: &'a Path,
    /// What stands before a key in messages: nothing, or the object's own key with a dot.
    pub(super) place: &'a str,
    pub(super) map: &'a Map<String, Value>,
}

impl<'a> Object<'a> {
    pub(super) fn get(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    /// Whether the key is there, with null for its value.
    pub(super) fn says_none(&self, key: &str) -> bool {
        self.map.get(key).is_some_and(Value::is_null)
    }

    /// What is wrong with a key.
    pub(super) fn fault(&self, key: &str, expected: impl ToString, got: impl ToString) -> Error {
        fault_in(self.path, &format!("{}{key}", self.place), expected, got)
    }

    /// The value of a key is not what it must be.
    pub(super) fn unfit(&self, key: &str, expected: impl ToString) -> Error {
        let got = self.get(key).map_or("nothing".to_owned(), quoted_value);
        self.fault(key, expected, got)
    }

    pub(super) fn number(&self, key: &str) -> Result<Option<f64>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value.as_f64().map(Some).ok_or_else(|| self.unfit(key, "a number"))
    }

    /// A size: a whole number from 1 to 2³¹, which may be written as `32.0`.
    pub(super) fn size(&self, key: &str) -> Result<Option<usize>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_f64() {
            Some(size) if size.fract() == 0.0 && (1.0..=LARGEST).contains(&size) => {
                Ok(Some(size as usize))
            }
            _ => Err(self.unfit(key, "a whole number from 1 to 2³¹")),
        }
    }

    /// A size that must be there.
    pub(super) fn needed_size(&self, key: &str) -> Result<usize> {
        self.size(key)?.ok_or_else(|| self.unfit(key, "a whole number from 1 to 2³¹"))
    }

    pub(super) fn flag(&self, key: &str) -> Result<Option<bool>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value.as_bool().map(Some).ok_or_else(|| self.unfit(key, "true or false"))
    }

    pub(super) fn text(&self, key: &str) -> Result<Option<&'a str>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value.as_str().map(Some).ok_or_else(|| self.unfit(key, "a string"))
    }

    pub(super) fn list(&self, key: &str) -> Result<Option<&'a [Value]>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let list = value.as_array().ok_or_else(|| self.unfit(key, "a list"))?;
        Ok(Some(list))
    }

    /// An object, unless it is empty, which counts as absent.
    pub(super) fn object(&self, key: &'a str) -> Result<Option<&'a Map<String, Value>>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let map = value.as_object().ok_or_else(|| self.unfit(key, "an object"))?;
        Ok(Some(map).filter(|map| map.values().any(|value| !value.is_null())))
    }
}

/// A value as it stands in the file, short enough for a message.
pub(super) fn quoted_value(value: &Value) -> String {
    match value {
        Value::String(text) => quoted(text),
        Value::Array(_) | Value::Object(_) => quoted(&value.to_string()),
        short => short.to_string(),
    }
}
