//! [`Device`]: a GPU, the stream that work is put on, and the kernels made for it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::sys::{self, CUdevice_attribute, CUfunction_attribute};
use cudarc::driver::{CudaContext, CudaFunction, CudaModule, CudaStream};
use cudarc::nvrtc::Ptx;

use crate::compile::{Cache, Program, Target};
use crate::element::Element;
use crate::error::{Error, Result};

/// A GPU and the stream that all work is put on. Clones share both, and the kernels.
#[derive(Debug, Clone)]
pub struct Device {
    stream: Arc<CudaStream>,
    cache: Cache,
    capability: u32,
    modules: Arc<Mutex<HashMap<Target, Arc<CudaModule>>>>,
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
}

/// Those for gradients.
#[derive(Debug)]
pub(crate) struct BackwardKernels {
    pub(crate) gather: CudaFunction,
    pub(crate) scan_back: CudaFunction,
    pub(crate) query_gradients: CudaFunction,
    pub(crate) sink_gradients: CudaFunction,
    pub(crate) sink_totals: CudaFunction,
    pub(crate) key_gradients: CudaFunction,
    pub(crate) moments: CudaFunction,
    pub(crate) moment_totals: CudaFunction,
}

impl Device {
    /// The GPU of this number, with its default stream.
    ///
    /// # Errors
    /// [`Error::NoDriver`] on a machine without one; [`Error::Driver`] for a number without a GPU.
    pub fn new(ordinal: usize) -> Result<Self> {
        // candle links it.
        #[cfg(not(feature = "candle"))]
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
        Ok(Self { stream, cache: Cache::default(), capability, modules: Arc::default() })
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

    /// The kernels for these sizes: d, e and m.
    pub(crate) fn kernels<E: Element>(
        &self,
        program: Program,
        sizes: [usize; 3],
    ) -> Result<Kernels> {
        let module = self.module::<E>(program, sizes)?;
        let load = |name| self.function(&module, name);
        Ok(Kernels {
            absorb: load("absorb")?,
            scan: load("scan")?,
            outputs: load("outputs")?,
            keep: load("keep")?,
            step: load("step")?,
        })
    }

    /// Those for gradients.
    pub(crate) fn backward_kernels<E: Element>(
        &self,
        sizes: [usize; 3],
    ) -> Result<BackwardKernels> {
        let module = self.module::<E>(Program::Backward, sizes)?;
        let load = |name| self.function(&module, name);
        Ok(BackwardKernels {
            gather: load("gather")?,
            scan_back: load("scan_back")?,
            query_gradients: load("query_gradients")?,
            sink_gradients: load("sink_gradients")?,
            sink_totals: load("sink_totals")?,
            key_gradients: load("key_gradients")?,
            moments: load("moments")?,
            moment_totals: load("moment_totals")?,
        })
    }

    /// Whether a block can have this much shared memory.
    pub(crate) fn check_shared(&self, needed: usize) -> Result<()> {
        if needed > self.shared_memory()?.unsigned_abs() as usize - STATIC_SHARED {
            return Err(Error::Unsupported {
                argument: "bytes of shared memory",
                expected: "no more than a block of this GPU can have",
                got: needed,
            });
        }
        Ok(())
    }

    /// Bytes of it that a block can have.
    fn shared_memory(&self) -> Result<i32> {
        let most = CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN;
        Ok(self.stream.context().attribute(most)?)
    }

    fn function(&self, module: &Arc<CudaModule>, name: &str) -> Result<CudaFunction> {
        let function = module.load_function(name)?;
        let own =
            function.get_attribute(CUfunction_attribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES)?;
        function.set_attribute(
            CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
            self.shared_memory()? - own,
        )?;
        Ok(function)
    }

    fn module<E: Element>(
        &self,
        program: Program,
        [dim, value_dim, features]: [usize; 3],
    ) -> Result<Arc<CudaModule>> {
        let (element, capability) = (E::CODE, self.capability);
        let target = Target { program, element, dim, value_dim, features, capability };
        let modules = || self.modules.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = modules().get(&target) {
            return Ok(found.clone());
        }
        let mut driver = 0;
        // SAFETY: `driver` is a place to write to.
        unsafe { sys::cuDriverGetVersion(&mut driver) }.result()?;
        let code = target.kernels(&self.cache, driver)?;
        let module = self.stream.context().load_module(Ptx::from_binary(code.to_vec()))?;
        modules().insert(target, module.clone());
        Ok(module)
    }
}
