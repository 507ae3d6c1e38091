//! The Python module `nanochat_rustbpe`: arguments in, results out, the GIL released around work.
//!
//! No panic crosses into Python as a panic: [`guard`] turns it into a RuntimeError. Arrays are handed over as numpy
//! arrays that own their memory; no list of ints is built for a batch.

use numpy::{Element, IntoPyArray, PyArray1, PyArray2, PyArrayMethods, PyReadonlyArray1, PyReadonlyArray2};
use numpy::{PyReadwriteArray2, PyUntypedArrayMethods};
use pyo3::exceptions::{PyRuntimeError, PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::pybacked::{PyBackedBytes, PyBackedStr};
use pyo3::types::{PyBytes, PyDict, PyString};
use std::borrow::Cow;
use std::ops::ControlFlow;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::mpsc::{sync_channel, Receiver, SyncSender};
use std::sync::{Arc, Mutex};

use crate::encoder::{Id, Specials};
use crate::packer::Key;
use crate::stream::Utf8Stream;
use crate::{column, merge, parallel, train, unicode, Error};

/// Text handed to a counting thread at a time.
const BATCH_BYTES: usize = 1 << 20;

impl From<Error> for PyErr {
    fn from(error: Error) -> Self {
        PyValueError::new_err(error.to_string())
    }
}

/// Runs `work` without the GIL; a panic becomes a RuntimeError.
fn guard<T: Send>(py: Python<'_>, work: impl FnOnce() -> Result<T, Error> + Send) -> PyResult<T> {
    match py.detach(|| catch_unwind(AssertUnwindSafe(work))) {
        Ok(result) => Ok(result?),
        Err(_) => Err(PyRuntimeError::new_err("nanochat_rustbpe failed inside; this is a bug, please report it")),
    }
}

/// A Python string's UTF-8. With `errors="replace"` lone surrogates become U+FFFD, as tiktoken has it.
fn utf8(text: &Bound<'_, PyAny>, errors: &str) -> PyResult<PyBackedStr> {
    if !matches!(errors, "strict" | "replace") {
        return Err(PyValueError::new_err(format!("errors={errors:?} is neither \"strict\" nor \"replace\"")));
    }
    let string = text.cast::<PyString>().map_err(|_| {
        let kind = text.get_type().name().map_or_else(|_| "?".into(), |name| name.to_string());
        PyTypeError::new_err(format!("text must be a str, not {kind}"))
    })?;
    match PyBackedStr::try_from(string.clone()) {
        Ok(backed) => Ok(backed),
        Err(_) if errors == "replace" => {
            let utf16 = string.call_method1("encode", ("utf-16-le", "surrogatepass"))?;
            let repaired = utf16.call_method1("decode", ("utf-16-le", "replace"))?;
            repaired.extract()
        }
        Err(error) => {
            let at = error.value(text.py()).getattr("start").and_then(|start| start.extract::<usize>()).unwrap_or(0);
            Err(PyValueError::new_err(format!(
                "the text holds a lone surrogate at character {at}, which has no UTF-8; \
                 clean the text, or pass errors=\"replace\" to read it as U+FFFD"
            )))
        }
    }
}

/// The texts of a batch, kept alive by Python: strings, or what `utf8_buffers()` of a column of strings gives.
enum Texts<'py> {
    Strings(Vec<PyBackedStr>),
    Column { data: PyReadonlyArray1<'py, u8>, offsets: Offsets<'py>, replace: bool },
}

#[derive(FromPyObject)]
enum Offsets<'py> {
    Short(PyReadonlyArray1<'py, i32>),
    Long(PyReadonlyArray1<'py, i64>),
}

impl<'py> Texts<'py> {
    fn new(texts: &Bound<'py, PyAny>, errors: &str) -> PyResult<Self> {
        if let Some(buffers) = texts.getattr_opt("utf8_buffers")? {
            let (data, offsets) = buffers.call0()?.extract()?;
            return Ok(Self::Column { data, offsets, replace: errors == "replace" });
        }
        let strings = texts.try_iter()?.map(|text| text.and_then(|text| utf8(&text, errors)));
        Ok(Self::Strings(strings.collect::<PyResult<_>>()?))
    }

    /// A function that needs no GIL and gives the texts.
    fn view<'a>(&'a self) -> PyResult<impl FnOnce() -> Result<Vec<Cow<'a, str>>, Error> + Send + 'a> {
        enum View<'a> {
            Strings(&'a [PyBackedStr]),
            Short(&'a [u8], &'a [i32], bool),
            Long(&'a [u8], &'a [i64], bool),
        }
        let view = match self {
            Self::Strings(strings) => View::Strings(strings),
            Self::Column { data, offsets: Offsets::Short(offsets), replace } => {
                View::Short(data.as_slice()?, offsets.as_slice()?, *replace)
            }
            Self::Column { data, offsets: Offsets::Long(offsets), replace } => {
                View::Long(data.as_slice()?, offsets.as_slice()?, *replace)
            }
        };
        Ok(move || match view {
            View::Strings(strings) => Ok(strings.iter().map(|text| Cow::Borrowed(&**text)).collect()),
            View::Short(data, offsets, replace) => column::texts(data, offsets, replace),
            View::Long(data, offsets, replace) => column::texts(data, offsets, replace),
        })
    }
}

/// A vocabulary, a split pattern and special tokens. Immutable; safe to share among threads.
#[pyclass(frozen, module = "nanochat_rustbpe")]
struct Encoding {
    inner: Arc<crate::Encoding>,
    allow_specials: bool,
}

impl Encoding {
    fn specials_from(&self, allow: Option<bool>) -> Specials {
        match allow.unwrap_or(self.allow_specials) {
            true => Specials::Always,
            false => Specials::Never,
        }
    }

    fn batch<'py, T: Id + Element>(
        &self,
        py: Python<'py>,
        texts: &Texts<'_>,
        first: Option<u32>,
        specials: Specials,
        threads: usize,
    ) -> PyResult<(Bound<'py, PyAny>, Bound<'py, PyArray1<i64>>)> {
        let view = texts.view()?;
        let (ids, offsets) = guard(py, || {
            let texts = view()?;
            let texts: Vec<&str> = texts.iter().map(|text| &**text).collect();
            self.inner.encode_batch::<T>(&texts, first, specials, threads)
        })?;
        Ok((ids.into_pyarray(py).into_any(), offsets.into_pyarray(py)))
    }
}

#[pymethods]
impl Encoding {
    #[new]
    #[pyo3(signature = (ranks, pattern, specials=Vec::new(), allow_specials=false))]
    fn new(
        py: Python<'_>,
        ranks: &Bound<'_, PyDict>,
        pattern: &str,
        specials: Vec<(String, u32)>,
        allow_specials: bool,
    ) -> PyResult<Self> {
        let ranks: Vec<(PyBackedBytes, u32)> = ranks
            .iter()
            .map(|(bytes, id)| Ok((bytes.cast_into::<PyBytes>()?.into(), id.extract()?)))
            .collect::<PyResult<_>>()?;
        let inner = guard(py, || {
            let vocabulary = crate::Vocabulary::new(ranks.iter().map(|(bytes, id)| (bytes.to_vec(), *id)))?;
            crate::Encoding::new(vocabulary, crate::Splitter::new(pattern)?, specials)
        })?;
        Ok(Self { inner: Arc::new(inner), allow_specials })
    }

    #[getter]
    fn pattern(&self) -> &str {
        self.inner.splitter.pattern()
    }

    #[getter]
    fn specials(&self) -> Vec<(String, u32)> {
        self.inner.specials().to_vec()
    }

    #[getter]
    fn allow_specials(&self) -> bool {
        self.allow_specials
    }

    #[getter]
    fn id_limit(&self) -> u32 {
        self.inner.id_limit()
    }

    fn ranks<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let ranks = PyDict::new(py);
        for (id, bytes) in self.inner.vocabulary.tokens() {
            ranks.set_item(PyBytes::new(py, bytes), id)?;
        }
        Ok(ranks)
    }

    /// For each token longer than a byte, in order of id, the two tokens that join into it.
    fn merges(&self, py: Python<'_>) -> PyResult<Vec<(u32, u32)>> {
        guard(py, || {
            let vocabulary = &self.inner.vocabulary;
            let mut merges = Vec::new();
            for (id, bytes) in vocabulary.tokens().filter(|(_, bytes)| bytes.len() > 1) {
                let mut parts = Vec::new();
                merge::merge_piece(vocabulary, bytes, id, |part| parts.push(part));
                match parts[..] {
                    [left, right] => merges.push((left, right)),
                    _ => return crate::invalid(format!("no merge of earlier tokens makes token {id}")),
                }
            }
            Ok(merges)
        })
    }

    fn split(&self, py: Python<'_>, text: &Bound<'_, PyAny>) -> PyResult<Vec<String>> {
        let text = utf8(text, "strict")?;
        guard(py, || Ok(self.inner.splitter.pieces(&text)?.into_iter().map(String::from).collect()))
    }

    #[pyo3(signature = (text, allow_specials=None, errors="strict"))]
    fn encode(
        &self,
        py: Python<'_>,
        text: &Bound<'_, PyAny>,
        allow_specials: Option<bool>,
        errors: &str,
    ) -> PyResult<Vec<u32>> {
        let (text, specials) = (utf8(text, errors)?, self.specials_from(allow_specials));
        guard(py, || {
            let mut ids = Vec::new();
            self.inner.encode_into(&text, specials, &mut ids)?;
            Ok(ids)
        })
    }

    #[pyo3(signature = (texts, first=None, threads=None, allow_specials=None, errors="strict"))]
    fn encode_batch<'py>(
        &self,
        py: Python<'py>,
        texts: &Bound<'py, PyAny>,
        first: Option<u32>,
        threads: Option<usize>,
        allow_specials: Option<bool>,
        errors: &str,
    ) -> PyResult<(Bound<'py, PyAny>, Bound<'py, PyArray1<i64>>)> {
        if texts.is_instance_of::<PyString>() {
            return Err(PyTypeError::new_err("encode_batch takes a sequence of str, not one str; use encode"));
        }
        let texts = Texts::new(texts, errors)?;
        let threads = threads.unwrap_or_else(parallel::available_threads);
        let specials = self.specials_from(allow_specials);
        match self.inner.id_limit() <= 1 << 16 {
            true => self.batch::<u16>(py, &texts, first, specials, threads),
            false => self.batch::<u32>(py, &texts, first, specials, threads),
        }
    }

    fn decode_bytes<'py>(&self, py: Python<'py>, ids: Vec<u32>) -> PyResult<Bound<'py, PyBytes>> {
        let bytes = guard(py, || {
            let mut bytes = Vec::new();
            self.inner.decode_into(ids.into_iter(), &mut bytes)?;
            Ok(bytes)
        })?;
        Ok(PyBytes::new(py, &bytes))
    }

    fn token_bytes<'py>(&self, py: Python<'py>, id: u32) -> Option<Bound<'py, PyBytes>> {
        self.inner.token_bytes(id).map(|bytes| PyBytes::new(py, bytes))
    }

    fn stream_decoder(&self) -> StreamDecoder {
        StreamDecoder { encoding: self.inner.clone(), stream: Mutex::default() }
    }

    fn __reduce__<'py>(slf: &Bound<'py, Self>) -> PyResult<(Bound<'py, PyAny>, Bound<'py, PyAny>)> {
        let (py, this) = (slf.py(), slf.get());
        let arguments = (this.ranks(py)?, this.pattern(), this.specials(), this.allow_specials);
        Ok((slf.get_type().into_any(), arguments.into_pyobject(py)?.into_any()))
    }
}

/// Decodes tokens as they come, never showing half a character.
#[pyclass(frozen, module = "nanochat_rustbpe")]
struct StreamDecoder {
    encoding: Arc<crate::Encoding>,
    stream: Mutex<Utf8Stream>,
}

#[pymethods]
impl StreamDecoder {
    fn push(&self, id: u32) -> PyResult<String> {
        let mut bytes = Vec::new();
        self.encoding.decode_into(std::iter::once(id), &mut bytes)?;
        Ok(self.stream.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).push(&bytes))
    }

    fn flush(&self) -> String {
        self.stream.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).flush()
    }
}

/// Text kept alive by Python while threads read it.
enum Text {
    Str(PyBackedStr),
    Bytes(PyBackedBytes),
}

impl Text {
    fn new(item: &Bound<'_, PyAny>) -> PyResult<Self> {
        match item.cast::<PyBytes>() {
            Ok(bytes) => Ok(Self::Bytes(bytes.clone().into())),
            Err(_) => Ok(Self::Str(utf8(item, "strict")?)),
        }
    }

    fn bytes(&self) -> &[u8] {
        match self {
            Self::Str(text) => text.as_bytes(),
            Self::Bytes(bytes) => bytes,
        }
    }

    fn text(&self) -> Result<&str, Error> {
        match self {
            Self::Str(text) => Ok(text),
            Self::Bytes(bytes) => std::str::from_utf8(bytes)
                .or_else(|error| crate::invalid(format!("a text of type bytes is not valid UTF-8: {error}"))),
        }
    }
}

/// How often each piece of a corpus occurs: what training starts from.
#[pyclass(module = "nanochat_rustbpe")]
struct WordCounts {
    splitter: crate::Splitter,
    inner: crate::WordCounts,
}

#[pymethods]
impl WordCounts {
    #[new]
    fn new(pattern: &str) -> PyResult<Self> {
        Ok(Self { splitter: crate::Splitter::new(pattern)?, inner: crate::WordCounts::new() })
    }

    fn __len__(&self) -> usize {
        self.inner.len()
    }

    #[getter]
    fn total(&self) -> u64 {
        self.inner.total()
    }

    /// Counts every text of an iterable. This thread pulls from the iterable while others count.
    #[pyo3(signature = (texts, threads=None))]
    fn add(&mut self, py: Python<'_>, texts: &Bound<'_, PyAny>, threads: Option<usize>) -> PyResult<()> {
        let threads = threads.unwrap_or_else(parallel::available_threads).max(1);
        let splitter = &self.splitter;
        let (sender, receiver) = sync_channel::<Vec<Text>>(threads);
        // Owned by the workers alone: when the last of them has failed, sending fails instead of waiting for ever.
        let receiver = Arc::new(Mutex::new(receiver));
        let count = |receiver: Arc<Mutex<Receiver<Vec<Text>>>>| -> Result<crate::WordCounts, Error> {
            let mut counts = crate::WordCounts::new();
            loop {
                let next = receiver.lock().expect("a panic ends the run").recv();
                let Ok(batch) = next else { return Ok(counts) };
                for text in &batch {
                    counts.add_text(splitter, text.text()?)?;
                }
            }
        };
        let iterator = texts.try_iter()?;
        let (pulled, counted) = std::thread::scope(|scope| {
            let workers: Vec<_> = (0..threads)
                .map(|_| {
                    let receiver = receiver.clone();
                    scope.spawn(move || count(receiver))
                })
                .collect();
            drop(receiver);
            let pulled = feed(py, iterator, &sender);
            drop(sender);
            let counted: Vec<_> = py.detach(|| workers.into_iter().map(|worker| worker.join()).collect());
            (pulled, counted)
        });
        let mut failed = None;
        let mut parts = Vec::new();
        for part in counted {
            match part {
                Ok(Ok(part)) => parts.push(part),
                Ok(Err(error)) => failed = Some(PyErr::from(error)),
                Err(_) => failed = Some(PyRuntimeError::new_err("a counting thread failed; this is a bug")),
            }
        }
        // A worker's error ends the feeding too, so it is the one to tell.
        if let Some(error) = failed {
            return Err(error);
        }
        pulled?;
        let inner = &mut self.inner;
        guard(py, || {
            parts.into_iter().for_each(|part| inner.merge(part));
            Ok(())
        })
    }

    /// Adds counts made earlier: (piece, count) in any order.
    fn add_counts(&mut self, counts: &Bound<'_, PyAny>) -> PyResult<()> {
        for item in counts.try_iter()? {
            let (piece, count): (PyBackedBytes, u64) = item?.extract()?;
            self.inner.add(&piece, count);
        }
        Ok(())
    }

    /// (piece, count) sorted by piece.
    fn items<'py>(&self, py: Python<'py>) -> Vec<(Bound<'py, PyBytes>, u64)> {
        let mut items: Vec<(Vec<u8>, u64)> = Vec::with_capacity(self.inner.len());
        self.inner.for_each(|piece, count| items.push((piece.to_vec(), count)));
        items.sort_unstable();
        items.into_iter().map(|(piece, count)| (PyBytes::new(py, &piece), count)).collect()
    }

    /// The first `count` merges; `progress(done)` is called about ten times a second.
    #[pyo3(signature = (count, progress=None))]
    fn train(&self, py: Python<'_>, count: usize, progress: Option<Py<PyAny>>) -> PyResult<Vec<(u32, u32)>> {
        let mut stopped = None;
        let mut last = std::time::Instant::now();
        let inner = &self.inner;
        let result = guard(py, || {
            let outcome = train::train(inner, count, &mut |done| {
                if last.elapsed().as_millis() < 100 {
                    return ControlFlow::Continue(());
                }
                last = std::time::Instant::now();
                let told = Python::attach(|py| {
                    py.check_signals()?;
                    progress.as_ref().map_or(Ok(()), |progress| progress.call1(py, (done,)).map(drop))
                });
                match told {
                    Ok(()) => ControlFlow::Continue(()),
                    Err(error) => {
                        stopped = Some(error);
                        ControlFlow::Break(())
                    }
                }
            });
            Ok(match outcome {
                Err(Error::Interrupted) => Err(stopped.take()),
                Err(error) => return Err(error),
                Ok(merges) => Ok(merges),
            })
        })?;
        result.map_err(|error| error.unwrap_or_else(|| PyRuntimeError::new_err("interrupted")))
    }
}

/// Pulls texts from a Python iterator and hands them to the counting threads in batches.
fn feed(py: Python<'_>, iterator: Bound<'_, pyo3::types::PyIterator>, sender: &SyncSender<Vec<Text>>) -> PyResult<()> {
    let (mut batch, mut size) = (Vec::new(), 0);
    // A closed channel means that all workers have failed; their errors say why.
    let send = |batch| py.detach(|| sender.send(batch)).is_ok();
    for item in iterator {
        let text = Text::new(&item?)?;
        size += text.bytes().len();
        batch.push(text);
        if size >= BATCH_BYTES {
            py.check_signals()?;
            if !send(std::mem::take(&mut batch)) {
                return Ok(());
            }
            size = 0;
        }
    }
    send(batch);
    Ok(())
}

/// Rows of one length from documents of any: see the module `packer`.
#[pyclass(module = "nanochat_rustbpe")]
struct BestFitPacker {
    inner: crate::packer::Packer,
}

#[derive(FromPyObject)]
enum Tokens<'py> {
    Short(PyReadonlyArray1<'py, u16>),
    Long(PyReadonlyArray1<'py, u32>),
}

#[pymethods]
impl BestFitPacker {
    #[new]
    #[pyo3(signature = (capacity, buffer_size=1000))]
    fn new(capacity: usize, buffer_size: usize) -> PyResult<Self> {
        Ok(Self { inner: crate::packer::Packer::new(capacity, buffer_size)? })
    }

    fn add(
        &mut self,
        py: Python<'_>,
        ids: Tokens<'_>,
        offsets: PyReadonlyArray1<'_, i64>,
        keys: PyReadonlyArray2<'_, i64>,
    ) -> PyResult<()> {
        if keys.shape()[1] != 4 || !keys.is_c_contiguous() {
            let shape = keys.shape();
            return Err(PyValueError::new_err(format!("keys must be C-contiguous, 4 numbers each, not {shape:?}")));
        }
        let keys: Vec<Key> =
            keys.as_slice()?.chunks_exact(4).map(|key| key.try_into().expect("a chunk of 4")).collect();
        let (inner, offsets) = (&mut self.inner, offsets.as_slice()?);
        match ids {
            Tokens::Short(ids) => {
                let ids = ids.as_slice()?;
                guard(py, || inner.add(ids, offsets, &keys))
            }
            Tokens::Long(ids) => {
                let ids = ids.as_slice()?;
                guard(py, || inner.add(ids, offsets, &keys))
            }
        }
    }

    fn finish(&mut self) {
        self.inner.finish();
    }

    #[getter]
    fn finished(&self) -> bool {
        self.inner.finished()
    }

    #[getter]
    fn newest(&self) -> Option<(i64, i64, i64, i64)> {
        self.inner.newest().map(|[a, b, c, d]| (a, b, c, d))
    }

    fn buffered<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyArray2<i64>>> {
        let keys: Vec<i64> = self.inner.buffered().flatten().collect();
        let count = keys.len() / 4;
        keys.into_pyarray(py).reshape([count, 4])
    }

    #[pyo3(signature = (rows, first=0, step=1))]
    fn pack(
        &mut self,
        py: Python<'_>,
        mut rows: PyReadwriteArray2<'_, i32>,
        first: usize,
        step: usize,
    ) -> PyResult<usize> {
        let capacity = self.inner.capacity();
        if rows.shape()[1] != capacity {
            let shape = rows.shape();
            return Err(PyValueError::new_err(format!("rows of shape {shape:?} do not hold {capacity} tokens each")));
        }
        if !rows.is_c_contiguous() {
            return Err(PyValueError::new_err("rows must be C-contiguous"));
        }
        if first >= step {
            return Err(PyValueError::new_err(format!("first {first} must be less than step {step}")));
        }
        let (inner, rows) = (&mut self.inner, rows.as_slice_mut()?);
        guard(py, || Ok(inner.pack(rows, first, step)))
    }
}

/// Ranks of the vocabulary that `merges` make: the 256 bytes, then one token for each merge.
#[pyfunction]
fn ranks_from_merges<'py>(py: Python<'py>, merges: Vec<(u32, u32)>) -> PyResult<Bound<'py, PyDict>> {
    let ranks = PyDict::new(py);
    let limit = |index: usize| 256 + index as u32;
    if let Some((index, _)) = merges.iter().enumerate().find(|(i, (a, b))| *a.max(b) >= limit(*i)) {
        return Err(PyValueError::new_err(format!("merge {index} joins a token that does not exist yet")));
    }
    let vocabulary = guard(py, || crate::Vocabulary::from_merges(&merges))?;
    for (id, bytes) in vocabulary.tokens() {
        ranks.set_item(PyBytes::new(py, bytes), id)?;
    }
    Ok(ranks)
}

#[pymodule(gil_used = false)]
fn nanochat_rustbpe(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<Encoding>()?;
    module.add_class::<StreamDecoder>()?;
    module.add_class::<WordCounts>()?;
    module.add_class::<BestFitPacker>()?;
    module.add_function(wrap_pyfunction!(ranks_from_merges, module)?)?;
    module.add("PATTERN_2", crate::split::PATTERN_2)?;
    module.add("PATTERN_3", crate::split::PATTERN_3)?;
    module.add("UNICODE_VERSION", unicode::UNICODE_VERSION)?;
    module.add("__version__", env!("CARGO_PKG_VERSION"))
}
