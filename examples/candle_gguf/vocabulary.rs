//! The tokenizer of a GGUF file: `tokenizer.json` beside it, or what its own vocabulary makes.

use std::path::Path;

use candle_core::quantized::gguf_file::{Content, Value};
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, SplitDelimiterBehavior};

use crate::Result;
use crate::lm::tokens::Tokenizer;
use crate::model::fault;

/// Kinds of tokens that stand for themselves wherever they are met: control tokens and those a user
/// defined.
const SPECIAL: [i32; 2] = [3, 4];

/// How Llama 3 cuts text into words.
const LLAMA_3: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
);

/// What turns text into tokens and back for the model at `path`, and the token that ends a text.
pub(crate) fn read(path: &Path, content: &Content) -> Result<(Tokenizer, Option<u32>)> {
    let vocabulary = content.tensor_infos.get("token_embd.weight");
    let vocabulary = vocabulary.and_then(|info| info.shape.dims().first().copied()).unwrap_or(0);
    let directory = path.parent().unwrap_or(Path::new(""));
    let tokenizer = match directory.join("tokenizer.json").exists() {
        true => Tokenizer::read(directory, vocabulary)?,
        false => own(path, content, vocabulary)?,
    };
    let end = content.metadata.get("tokenizer.ggml.eos_token_id");
    let end = end.and_then(|end| end.to_u32().ok()).filter(|&end| (end as usize) < vocabulary);
    Ok((tokenizer, end))
}

/// What the file's own vocabulary and merges make.
pub(crate) fn own(path: &Path, content: &Content, vocabulary: usize) -> Result<Tokenizer> {
    const HINT: &str = "; a tokenizer.json beside the file takes its place";
    let key = |name: &str| format!("tokenizer.ggml.{name}");
    let unfit = |name: &str, expected: &str| {
        let found = match content.metadata.get(&key(name)) {
            None => "nothing".to_owned(),
            Some(Value::String(text)) => format!("{text:?}"),
            Some(value) => format!("{:?}", value.value_type()),
        };
        fault(path, &key(name), expected, found + HINT)
    };
    let text = |name: &str| match content.metadata.get(&key(name)) {
        Some(Value::String(text)) => Some(text.as_str()),
        _ => None,
    };
    let list = |name: &str| match content.metadata.get(&key(name)) {
        Some(Value::Array(values)) => Some(values),
        _ => None,
    };
    let strings = |name: &str| -> Option<Vec<&str>> {
        list(name)?.iter().map(|value| value.to_string().ok().map(String::as_str)).collect()
    };
    if text("model") != Some("gpt2") {
        return Err(unfit("model", "\"gpt2\", of merged bytes"));
    }
    let words = strings("tokens").ok_or_else(|| unfit("tokens", "a list of texts"))?;
    if words.len() != vocabulary {
        let expected = format!("a list of {vocabulary}, one for each row of token_embd.weight");
        return Err(fault(path, &key("tokens"), &expected, words.len().to_string() + HINT));
    }
    let merges = strings("merges").and_then(|merges| {
        let pair = |merge: &str| merge.split_once(' ').map(|(a, b)| (a.to_owned(), b.to_owned()));
        merges.into_iter().map(pair).collect::<Option<Vec<_>>>()
    });
    let merges = merges.ok_or_else(|| unfit("merges", "a list of pairs"))?;
    let bytes = |own_words| ByteLevel::new(false, true, own_words);
    let (cut, whole_words) = match text("pre") {
        Some("gpt-2") => (PreTokenizerWrapper::from(bytes(true)), false),
        Some("smollm") => {
            let parts = vec![Digits::new(true).into(), bytes(true).into()];
            (Sequence::new(parts).into(), false)
        }
        Some("llama-bpe") => {
            let pattern = SplitPattern::Regex(LLAMA_3.to_owned());
            let split = Split::new(pattern, SplitDelimiterBehavior::Isolated, false)?;
            (Sequence::new(vec![split.into(), bytes(false).into()]).into(), true)
        }
        _ => return Err(unfit("pre", "gpt-2, smollm or llama-bpe")),
    };
    let numbered = words.iter().zip(0..).map(|(&word, token)| (word.to_owned(), token));
    let model = BPE::builder()
        .vocab_and_merges(numbered.collect::<Vocab>(), merges)
        .ignore_merges(whole_words)
        .build()
        .map_err(|error| fault(path, &key("merges"), "pairs of the vocabulary", error))?;
    let mut tokenizer = tokenizers::Tokenizer::new(model);
    tokenizer.with_pre_tokenizer(Some(cut)).with_decoder(Some(bytes(true)));
    let special = list("token_type")
        .into_iter()
        .flatten()
        .zip(&words)
        .filter(|(kind, _)| matches!(kind, Value::I32(kind) if SPECIAL.contains(kind)));
    let special: Vec<_> = special.map(|(_, &word)| AddedToken::from(word, true)).collect();
    tokenizer.add_special_tokens(special)?;
    Ok(Tokenizer::Subwords(Box::new(tokenizer)))
}
