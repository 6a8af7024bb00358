//! [`Device`]: a GPU, the stream that work is put on, and the kernels made for it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::sys::{self, CUdevice_attribute, CUfunction_attribute};
use cudarc::driver::{CudaContext, CudaFunction, CudaStream};
use cudarc::nvrtc::Ptx;

use crate::compile::{Cache, Target};
use crate::element::Element;
use crate::error::{Error, Result};

/// A GPU and the stream that all work is put on. Clones share both, and the kernels.
#[derive(Debug, Clone)]
pub struct Device {
    stream: Arc<CudaStream>,
    cache: Cache,
    capability: u32,
    kernels: Arc<Mutex<HashMap<Target, Arc<Kernels>>>>,
}

/// Bytes of shared memory that no kernel takes more than of its own, whatever a call asks for.
const STATIC_SHARED: usize = 8192;

/// The kernels for one set of sizes.
#[derive(Debug)]
pub(crate) struct Kernels {
    pub(crate) absorb: CudaFunction,
    pub(crate) scan: CudaFunction,
    pub(crate) outputs: CudaFunction,
    pub(crate) keep: CudaFunction,
    pub(crate) step: CudaFunction,
    /// Bytes of shared memory that a block can have.
    pub(crate) shared_limit: usize,
}

impl Device {
    /// The GPU of this number, with its default stream.
    ///
    /// # Errors
    /// [`Error::NoDriver`] on a machine without one; [`Error::Driver`] for a number without a GPU.
    pub fn new(ordinal: usize) -> Result<Self> {
        // SAFETY: loading the driver runs its initialisers only.
        if !unsafe { sys::is_culib_present() } {
            return Err(Error::NoDriver);
        }
        Self::from_stream(CudaContext::new(ordinal)?.default_stream())
    }

    /// The GPU and stream that somebody else has opened.
    ///
    /// # Errors
    /// [`Error::Driver`], [`Error::Unsupported`] for a GPU older than compute capability 8.0.
    pub fn from_stream(stream: Arc<CudaStream>) -> Result<Self> {
        let (major, minor) = stream.context().compute_capability()?;
        let capability = (10 * major + minor).unsigned_abs();
        if capability < 80 {
            return Err(Error::Unsupported {
                argument: "compute capability",
                expected: "at least 80",
                got: capability as usize,
            });
        }
        Ok(Self { stream, cache: Cache::default(), capability, kernels: Arc::default() })
    }

    /// Keeps compiled kernels elsewhere, or nowhere.
    #[must_use]
    pub fn with_cache(self, cache: Cache) -> Self {
        Self { cache, ..self }
    }

    /// The stream that all work is put on.
    pub fn stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }

    /// The kernels for these sizes.
    pub(crate) fn kernels<E: Element>(
        &self,
        dim: usize,
        value_dim: usize,
        features: usize,
    ) -> Result<Arc<Kernels>> {
        let target =
            Target { element: E::CODE, dim, value_dim, features, capability: self.capability };
        let kernels = || self.kernels.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = kernels().get(&target) {
            return Ok(found.clone());
        }
        let mut driver = 0;
        // SAFETY: `driver` is a place to write to.
        unsafe { sys::cuDriverGetVersion(&mut driver) }.result()?;
        let code = target.kernels(&self.cache, driver)?;
        let context = self.stream.context();
        let module = context.load_module(Ptx::from_binary(code.to_vec()))?;
        let most = context
            .attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?;
        let load = |name: &str| -> Result<CudaFunction> {
            let function = module.load_function(name)?;
            let own = function
                .get_attribute(CUfunction_attribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES)?;
            function.set_attribute(
                CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                most - own,
            )?;
            Ok(function)
        };
        let found = Arc::new(Kernels {
            absorb: load("absorb")?,
            scan: load("scan")?,
            outputs: load("outputs")?,
            keep: load("keep")?,
            step: load("step")?,
            shared_limit: most.unsigned_abs() as usize - STATIC_SHARED,
        });
        kernels().insert(target, found.clone());
        Ok(found)
    }
}
