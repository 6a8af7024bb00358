//! What can be known without a GPU: the kernels compile, and a missing driver is a typed error.

use std::{env, thread};

use dijiang_cuda::{Cache, Device, Element, Error, Result, compile_ahead};
use half::{bf16, f16};

fn compiles<E: Element>(capability: u32) -> Result<()> {
    for sizes in [[64, 64, 64], [128, 128, 256]] {
        compile_ahead::<E>(sizes, capability, 0, &Cache::Off)?;
    }
    Ok(())
}

/// For A100 and H100, smallest and largest sizes. Without NVRTC there is nothing to test, unless
/// `DIJIANG_CUDA_NVRTC=required`, as in CI.
#[test]
fn kernels_compile() {
    let of = |capability| {
        compiles::<bf16>(capability)
            .and_then(|()| compiles::<f16>(capability))
            .and_then(|()| compiles::<f32>(capability))
    };
    let required = env::var("DIJIANG_CUDA_NVRTC").is_ok_and(|value| value == "required");
    let threads = [80, 90].map(|capability| thread::spawn(move || of(capability)));
    for thread in threads {
        match thread.join().expect("compiling does not panic") {
            Ok(()) => {}
            Err(Error::NoCompiler) if !required => eprintln!("no NVRTC: nothing was compiled"),
            Err(error) => panic!("{error}"),
        }
    }
}

#[test]
fn an_unknown_gpu_is_an_error_with_the_compilers_words() {
    match compile_ahead::<bf16>([64, 64, 64], 1, 0, &Cache::Off) {
        Err(Error::Compile { architecture, log }) => {
            assert_eq!(architecture, "-arch=sm_1");
            assert!(log.contains("gpu-architecture"), "{log}");
        }
        Err(Error::NoCompiler) => {}
        other => panic!("{other:?}"),
    }
}

#[test]
fn no_driver_is_an_error() {
    match Device::new(0) {
        Err(Error::NoDriver | Error::Driver(_)) | Ok(_) => {}
        Err(error) => panic!("{error}"),
    }
}

#[test]
fn everything_can_be_sent_to_another_thread() {
    fn is_send_and_sync<T: Send + Sync>() {}
    is_send_and_sync::<Device>();
    is_send_and_sync::<dijiang_cuda::Attention<bf16>>();
    is_send_and_sync::<dijiang_cuda::Pool<f32>>();
    is_send_and_sync::<dijiang_cuda::Workspace<f16>>();
    is_send_and_sync::<dijiang_cuda::BackwardWorkspace<f16>>();
}
