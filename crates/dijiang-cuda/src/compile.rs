//! Kernels from source: NVRTC at first use, kept for the process and, if wished, on disk.

use std::collections::HashMap;
use std::ffi::{CStr, CString, c_char};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::{env, fs, process};

use cudarc::nvrtc::result as nvrtc;
use cudarc::nvrtc::sys;

use crate::element::Element;
use crate::error::{Error, Result};

/// Which kernels: most never take gradients or do without windows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Program {
    Forward,
    /// Forward without windows.
    Windowless,
    Backward,
}

const BACKWARD: &str = concat!(
    "#define BACKWARD\n",
    include_str!("../kernels/common.cu"),
    include_str!("../kernels/products.cu"),
    include_str!("../kernels/wgmma.cu"),
    include_str!("../kernels/softmax.cu"),
    include_str!("../kernels/absorb.cu"),
    include_str!("../kernels/scan.cu"),
    include_str!("../kernels/outputs.cu"),
    include_str!("../kernels/backward.cu"),
);

const FORWARD: &str = concat!(
    include_str!("../kernels/common.cu"),
    include_str!("../kernels/products.cu"),
    include_str!("../kernels/wgmma.cu"),
    include_str!("../kernels/softmax.cu"),
    include_str!("../kernels/absorb.cu"),
    include_str!("../kernels/scan.cu"),
    include_str!("../kernels/own.cu"),
    include_str!("../kernels/outputs.cu"),
    include_str!("../kernels/step.cu"),
);

/// Where compiled kernels are kept between processes.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Cache {
    /// Nowhere.
    Off,
    /// In this directory, one file for each set of sizes. Whoever can write there decides what runs
    /// on the GPU.
    Directory(PathBuf),
}

impl Default for Cache {
    /// `dijiang` in the user's cache directory; off if there is none.
    fn default() -> Self {
        let home = || env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache"));
        let cache = env::var_os("XDG_CACHE_HOME").map(PathBuf::from).or_else(home);
        cache.map_or(Self::Off, |cache| Self::Directory(cache.join("dijiang")))
    }
}

/// Compiles the kernels for one set of sizes into a cache, on a machine with NVRTC and with or
/// without a GPU: for a GPU of this compute capability (90 for an H100) and a driver of this
/// version (13000 for CUDA 13.0).
///
/// # Errors
/// [`Error::NoCompiler`], [`Error::Compile`].
pub fn compile_ahead<E: Element>(
    [dim, value_dim, features]: [usize; 3],
    capability: u32,
    driver: i32,
    cache: &Cache,
) -> Result<()> {
    [Program::Forward, Program::Windowless, Program::Backward].into_iter().try_for_each(|program| {
        let target = Target { program, element: E::CODE, dim, value_dim, features, capability };
        target.kernels(cache, driver).map(drop)
    })
}

/// What the kernels are compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Target {
    pub(crate) program: Program,
    /// [`Element::CODE`](crate::Element).
    pub(crate) element: u32,
    /// d.
    pub(crate) dim: usize,
    /// e.
    pub(crate) value_dim: usize,
    /// m.
    pub(crate) features: usize,
    /// Compute capability: 90 for an H100.
    pub(crate) capability: u32,
}

impl Target {
    fn source(&self) -> &'static str {
        match self.program {
            Program::Forward | Program::Windowless => FORWARD,
            Program::Backward => BACKWARD,
        }
    }

    fn options(&self) -> Vec<String> {
        let Self { element, dim, value_dim, features, capability, .. } = self;
        // Hopper's own instructions are for it alone.
        let only = if *capability == 90 { "a" } else { "" };
        let mut options = vec![format!("-arch=sm_{capability}{only}")];
        options.extend(["-std=c++17", "-default-device"].map(String::from));
        options.push(format!("-DELEMENT={element}"));
        options.extend([
            format!("-DD={dim}"),
            format!("-DE={value_dim}"),
            format!("-DM={features}"),
        ]);
        if self.program == Program::Windowless {
            options.push("-DWINDOWLESS=1".into());
        }
        options
    }

    /// The kernels as machine code for this target, from the process, the cache or NVRTC; `driver`
    /// is the driver's version.
    ///
    /// # Errors
    /// [`Error::NoCompiler`], [`Error::Compile`].
    pub(crate) fn kernels(&self, cache: &Cache, driver: i32) -> Result<Arc<Vec<u8>>> {
        static KEPT: OnceLock<Mutex<HashMap<Target, Arc<Vec<u8>>>>> = OnceLock::new();
        let kept = KEPT.get_or_init(Mutex::default);
        let kept = || kept.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(code) = kept().get(self) {
            return Ok(code.clone());
        }
        let file = match cache {
            Cache::Off => None,
            Cache::Directory(directory) => Some(directory.join(self.file_name(driver))),
        };
        let stored = file.as_ref().and_then(|file| fs::read(file).ok()).and_then(checked);
        let code = match stored {
            Some(code) => code,
            None => {
                let code = self.compile()?;
                // A cache that cannot be written to is no reason to fail.
                file.inspect(|file| drop(store(file, &code)));
                code
            }
        };
        let code = Arc::new(code);
        kept().insert(*self, code.clone());
        Ok(code)
    }

    fn file_name(&self, driver: i32) -> String {
        let version = env!("CARGO_PKG_VERSION");
        let hash = fnv1a(&format!("{version} {driver} {:?} {}", self.options(), self.source()));
        format!("{hash:016x}.cubin")
    }

    fn compile(&self) -> Result<Vec<u8>> {
        // candle links it.
        #[cfg(not(feature = "candle"))]
        // SAFETY: loading NVRTC runs its initialisers only.
        if !unsafe { sys::is_culib_present() } {
            return Err(Error::NoCompiler);
        }
        let failed = |log: String| Error::Compile { architecture: self.options().remove(0), log };
        let source = CString::new(self.source()).map_err(|error| failed(error.to_string()))?;
        let program = nvrtc::create_program(&source, Some(c"dijiang.cu"));
        let program = program.map_err(|error| failed(error.to_string()))?;
        // SAFETY: `program` was created above and is destroyed below, once.
        let code = unsafe { nvrtc::compile_program(program, &self.options()) }
            .map_err(|error| format!("{error}: {}", log(program)))
            .and_then(|()| machine_code(program));
        // SAFETY: as above.
        unsafe { nvrtc::destroy_program(program) }.map_err(|error| failed(error.to_string()))?;
        code.map_err(failed)
    }
}

fn log(program: sys::nvrtcProgram) -> String {
    // SAFETY: `program` is alive.
    let log: Vec<c_char> = unsafe { nvrtc::get_program_log(program) }.unwrap_or_default();
    let bytes: Vec<u8> = log.iter().map(|&byte| byte as u8).collect();
    CStr::from_bytes_until_nul(&bytes).map_or(String::new(), |log| log.to_string_lossy().into())
}

fn machine_code(program: sys::nvrtcProgram) -> Result<Vec<u8>, String> {
    let mut size = 0;
    // SAFETY: `program` is alive, `size` a place to write to.
    let result = unsafe { sys::nvrtcGetCUBINSize(program, &mut size) };
    result.result().map_err(|error| error.to_string())?;
    let mut code = vec![0u8; size];
    // SAFETY: `code` has the size that was asked for.
    let result = unsafe { sys::nvrtcGetCUBIN(program, code.as_mut_ptr().cast()) };
    result.result().map_err(|error| error.to_string())?;
    Ok(code)
}

/// Checksum first, so that a damaged file is compiled anew.
fn store(file: &PathBuf, code: &[u8]) -> std::io::Result<()> {
    if let Some(directory) = file.parent() {
        fs::create_dir_all(directory)?;
    }
    let own = file.with_extension(process::id().to_string());
    fs::write(&own, [&crc32fast::hash(code).to_le_bytes(), code].concat())?;
    fs::rename(own, file)
}

fn checked(bytes: Vec<u8>) -> Option<Vec<u8>> {
    let (checksum, code) = bytes.split_first_chunk::<4>()?;
    (crc32fast::hash(code).to_le_bytes() == *checksum).then(|| code.to_vec())
}

fn fnv1a(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn damaged_kernels_are_not_loaded() {
        let directory = env::temp_dir().join(format!("dijiang-cuda-{}", process::id()));
        let file = directory.join("kernels.cubin");
        store(&file, b"code").expect("the directory of temporary files can be written to");
        let mut bytes = fs::read(&file).expect("it was just written");
        assert_eq!(checked(bytes.clone()).as_deref(), Some(&b"code"[..]));
        bytes[5] ^= 1;
        assert_eq!(checked(bytes), None);
        fs::remove_dir_all(directory).expect("it is there");
    }

    #[test]
    fn names_depend_on_everything() {
        let program = Program::Forward;
        let [dim, value_dim, features] = [64; 3];
        let target = Target { program, element: 0, dim, value_dim, features, capability: 90 };
        let others = [
            Target { program: Program::Backward, ..target },
            Target { program: Program::Windowless, ..target },
            Target { element: 1, ..target },
            Target { dim: 128, ..target },
            Target { value_dim: 128, ..target },
            Target { features: 128, ..target },
            Target { capability: 80, ..target },
        ];
        assert!(others.iter().all(|other| other.file_name(1) != target.file_name(1)));
        assert_ne!(target.file_name(1), target.file_name(2));
    }
}
