//! The kernels' source, and what it is compiled with. Reads no file: the source is part of the binary.

use baton_model::KvDtype;

use crate::args::ElementType;

/// All files, in the order in which they use each other; one translation unit.
const FILES: [(&str, &str); 4] = [
    ("common.cuh", include_str!("../kernels/common.cuh")),
    ("rows.cu", include_str!("../kernels/rows.cu")),
    ("linear.cu", include_str!("../kernels/linear.cu")),
    ("attention.cu", include_str!("../kernels/attention.cu")),
];

/// Kernels that every program has.
const ALWAYS: [&str; 7] = [
    "embed",
    "rms_norm",
    "silu_mul",
    "gather_rows",
    "rope_table",
    "rope_kv_write",
    "attention_merge",
];

/// Kernels for 16-bit activations.
const HALF: [&str; 12] = [
    "linear_dense_16",
    "linear_dense_64",
    "linear_int8_16",
    "linear_int8_64",
    "linear_group8_16",
    "linear_group8_64",
    "linear_group4_16",
    "linear_group4_64",
    "linear_group4min_16",
    "linear_group4min_64",
    "linear_dense_many",
    "attention",
];

/// Kernels for f32 activations.
const FULL: [&str; 2] = ["linear_f32", "attention_f32"];

/// The kernels for models of one shape.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Program {
    /// Elements per head.
    pub head_dim: usize,
    /// Element type of K and V, and of activations.
    pub element: ElementType,
}

impl Program {
    /// For heads of `head_dim` and K and V of that type. `Err` says what the kernels cannot do.
    pub fn new(head_dim: usize, dtype: KvDtype) -> Result<Self, String> {
        let element = match dtype {
            KvDtype::F32 => ElementType::F32,
            KvDtype::F16 => ElementType::F16,
            KvDtype::Bf16 => ElementType::Bf16,
        };
        if element != ElementType::F32 && (head_dim == 0 || !head_dim.is_multiple_of(32)) {
            return Err(format!(
                "the GPU kernels need heads of a multiple of 32 elements, and this model's have {head_dim}"
            ));
        }
        Ok(Program { head_dim, element })
    }

    /// Names, in the order of [`KernelId`](crate::KernelId).
    pub fn kernels(&self) -> Vec<&'static str> {
        let typed: &[&str] = match self.element {
            ElementType::F32 => &FULL,
            _ => &HALF,
        };
        ALWAYS.iter().chain(typed).copied().collect()
    }

    /// The source.
    pub fn source(&self) -> String {
        let mut text = String::new();
        for (name, file) in FILES {
            text += &format!("#line 1 \"{name}\"\n{file}\n");
        }
        text
    }

    /// What it is compiled with, for any compiler.
    pub fn defines(&self) -> [String; 2] {
        [
            format!("-DHEAD_DIM={}", self.head_dim),
            format!("-DKV_TYPE={}", self.element as u32),
        ]
    }

    /// NVRTC's options for a device. Contraction is off, so that kernels which must agree to the bit do (promise P1).
    pub fn options(&self, capability: (u32, u32)) -> Vec<String> {
        let mut options = vec![
            format!("--gpu-architecture={}", target(capability)),
            "--std=c++17".into(),
            "--fmad=false".into(),
        ];
        options.extend(self.defines());
        options
    }
}

/// `sm_90` for 9.0.
pub fn target((major, minor): (u32, u32)) -> String {
    format!("sm_{major}{minor}")
}

/// Tensor cores for bf16, and copies in the background.
pub const CAPABILITY_MIN: (u32, u32) = (8, 0);
