//! Time per token and peak memory of one layer on burn's CPU backend: burn's softmax attention and
//! this crate's two paths, as a layer and without its projections. Every row is a process of its
//! own, so that its peak is its own.

use std::process::Command;
use std::time::Instant;
use std::{env, fs};

use burn::nn::LinearConfig;
use burn::nn::attention::{MhaInput, MultiHeadAttentionConfig, generate_autoregressive_mask};
use burn::tensor::module::attention;
use burn::tensor::ops::AttentionModuleOptions;
use burn::tensor::{Device, Distribution, Tensor};
use clap::{Parser, ValueEnum};
use comfy_table::Table;
use dijiang_burn::{AttentionPath, DijiangAttentionConfig, Error};

/// Measures one causal layer, a forward pass of one sequence, heads of 64.
#[derive(Parser)]
struct Args {
    /// Numbers of tokens.
    #[arg(long, value_delimiter = ',', default_values_t = [1024, 4096, 16384])]
    tokens: Vec<usize>,
    /// Heads.
    #[arg(long, default_value_t = 8)]
    heads: usize,
    /// Softmax up to so many tokens only.
    #[arg(long, default_value_t = 4096)]
    softmax: usize,
    /// Measure each so often, and take the shortest time.
    #[arg(long, default_value_t = 5)]
    repeat: usize,
    /// Time on the CPU, of all threads together, in place of the clock's: for a machine that others
    /// use too, with RAYON_NUM_THREADS=1. On Linux.
    #[arg(long)]
    on_cpu: bool,
    /// One row alone.
    #[arg(long)]
    only: Option<Row>,
}

#[derive(Clone, Copy, Debug, PartialEq, ValueEnum)]
enum Row {
    /// The four projections without attention between them.
    Projections,
    /// burn's `MultiHeadAttention`, with a mask.
    MultiHead,
    /// burn's fused attention between the same projections.
    Fused,
    /// This crate by tensor operations.
    Tensors,
    /// This crate by its engine.
    Engine,
}

const ROWS: [Row; 5] = [Row::Projections, Row::MultiHead, Row::Fused, Row::Tensors, Row::Engine];

impl Row {
    fn is_softmax(self) -> bool {
        matches!(self, Row::MultiHead | Row::Fused)
    }

    /// Seconds of the layer on `n` tokens, and of what is between its projections.
    fn seconds(self, n: usize, args: &Args) -> Result<[f64; 2], Error> {
        let (heads, repeat) = (args.heads, args.repeat);
        let device = Device::flex();
        let width = heads * 64;
        let normal = Distribution::Normal(0.0, 1.0);
        let x = Tensor::<3>::random([1, n, width], normal, &device);
        let linear = [(); 4].map(|()| LinearConfig::new(width, width).init(&device));
        let mha = MultiHeadAttentionConfig::new(width, heads).with_dropout(0.0).init(&device);
        let layer = DijiangAttentionConfig::new(width, heads).init(&device)?;
        let layer = match self {
            Row::Tensors => layer.with_path(AttentionPath::Tensors),
            _ => layer,
        };
        let heads_of = |x: Tensor<3>| x.reshape([1, n, heads, 64]);
        let fused = |q: Tensor<4>, k: Tensor<4>, v: Tensor<4>| {
            let [q, k, v] = [q, k, v].map(|x| x.swap_dims(1, 2));
            let causal = AttentionModuleOptions { is_causal: true, ..Default::default() };
            attention(q, k, v, None, None, causal).swap_dims(1, 2)
        };
        let whole = || match self {
            Row::Projections => {
                let [q, k, v] = [0, 1, 2].map(|i| linear[i].forward(x.clone()));
                Ok(linear[3].forward(q + k + v))
            }
            Row::MultiHead => {
                let mask = generate_autoregressive_mask(1, n, &device);
                Ok(mha.forward(MhaInput::self_attn(x.clone()).mask_attn(mask)).context)
            }
            Row::Fused => {
                let [q, k, v] = [0, 1, 2].map(|i| heads_of(linear[i].forward(x.clone())));
                Ok(linear[3].forward(fused(q, k, v).reshape([1, n, width])))
            }
            Row::Tensors | Row::Engine => layer.forward(x.clone()),
        };
        let [q, k, v] = [0, 1, 2].map(|i| heads_of(linear[i].forward(x.clone())));
        let alone = || match self {
            // Nothing of its own, and inside one function with the projections.
            Row::Projections | Row::MultiHead => Ok(None),
            Row::Fused => Ok(Some(fused(q.clone(), k.clone(), v.clone()))),
            Row::Tensors | Row::Engine => {
                layer.attend(q.clone(), k.clone(), v.clone(), None).map(Some)
            }
        };
        let mut shortest = [f64::INFINITY; 2];
        for _ in 0..repeat {
            let start = Watch::new(args.on_cpu);
            let out = whole()?;
            shortest[0] = shortest[0].min(start.seconds());
            assert!(out.sum().into_scalar::<f32>().is_finite());
            let start = Watch::new(args.on_cpu);
            let Some(out) = alone()? else { continue };
            shortest[1] = shortest[1].min(start.seconds());
            assert!(out.sum().into_scalar::<f32>().is_finite());
        }
        Ok(shortest)
    }
}

/// Since when, by the clock or in seconds on the CPU.
enum Watch {
    Clock(Instant),
    Cpu(f64),
}

impl Watch {
    fn new(on_cpu: bool) -> Self {
        if on_cpu { Self::Cpu(on_cpu_so_far()) } else { Self::Clock(Instant::now()) }
    }

    fn seconds(&self) -> f64 {
        match self {
            Self::Clock(start) => start.elapsed().as_secs_f64(),
            Self::Cpu(start) => on_cpu_so_far() - start,
        }
    }
}

/// What this process's threads have had of the CPU, NaN where the system does not say.
fn on_cpu_so_far() -> f64 {
    let nanoseconds = |thread: fs::DirEntry| -> Option<f64> {
        let stat = fs::read_to_string(thread.path().join("schedstat")).ok()?;
        stat.split_whitespace().next()?.parse().ok()
    };
    let Ok(threads) = fs::read_dir("/proc/self/task") else { return f64::NAN };
    threads.map(|thread| thread.ok().and_then(nanoseconds).unwrap_or(f64::NAN)).sum::<f64>() / 1e9
}

/// The most memory this process has held, in MB, where the system says so.
fn peak() -> Option<f64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    Some(line.split_whitespace().nth(1)?.parse::<f64>().ok()? / 1000.0)
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args = Args::parse();
    if let Some(row) = args.only {
        let n = args.tokens[0];
        let [whole, alone] = row.seconds(n, &args)?;
        println!("{whole} {alone} {}", peak().unwrap_or(f64::NAN));
        return Ok(());
    }
    let mut table = Table::new();
    table.set_header(["tokens", "", "layer, ms", "µs/token", "alone, ms", "µs/token", "peak MB"]);
    for &n in &args.tokens {
        for row in ROWS.into_iter().filter(|row| n <= args.softmax || !row.is_softmax()) {
            let name = row.to_possible_value().map(|value| value.get_name().to_owned());
            let name = name.unwrap_or_default();
            let output = Command::new(env::current_exe()?)
                .args(["--only", &name, "--tokens", &n.to_string()])
                .args(["--heads", &args.heads.to_string(), "--repeat", &args.repeat.to_string()])
                .args(args.on_cpu.then_some("--on-cpu"))
                .output()?;
            if !output.status.success() {
                return Err(String::from_utf8_lossy(&output.stderr).into());
            }
            let printed = String::from_utf8(output.stdout)?;
            let [whole, alone, peak] = printed.split_whitespace().collect::<Vec<_>>()[..] else {
                return Err(format!("not three numbers: {printed}").into());
            };
            let (whole, alone): (f64, f64) = (whole.parse()?, alone.parse()?);
            let cell = |value: f64, digits| match value.is_finite() {
                true => format!("{value:.digits$}"),
                false => String::new(),
            };
            table.add_row([
                n.to_string(),
                name,
                cell(whole * 1e3, 1),
                cell(whole * 1e6 / n as f64, 2),
                cell(alone * 1e3, 1),
                cell(alone * 1e6 / n as f64, 2),
                cell(peak.parse()?, 0),
            ]);
        }
    }
    println!("{table}");
    Ok(())
}
