//! What there is for a GPU worker on this machine, and what is missing, in words. Opens no device and computes nothing, but
//! for compiling the kernels once.

use crate::cache;
use crate::cuda;
use crate::driver::{DeviceError, DeviceInfo};
use crate::nvrtc::Nvrtc;
use crate::source::{CAPABILITY_MIN, Program, target};
use baton_model::KvDtype;
use serde::Serialize;
use std::fmt;

/// NCCL's library, for tensor parallelism over GPUs.
const NCCL: &str = "libnccl.so.2";

/// How a finding is meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// As it should be.
    Good,
    /// Good to know; nothing is wrong.
    Note,
    /// A worker cannot use a GPU because of it.
    Wrong,
}

/// One thing found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// How it is meant.
    pub level: Level,
    /// What it is about.
    pub about: &'static str,
    /// A sentence.
    pub text: String,
}

/// What [`examine`] found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Report {
    /// In the order of a start.
    pub findings: Vec<Finding>,
}

impl Report {
    /// Whether a worker can compute on a GPU here.
    pub fn usable(&self) -> bool {
        self.findings.iter().all(|finding| finding.level != Level::Wrong)
    }

    fn add(&mut self, level: Level, about: &'static str, text: impl Into<String>) {
        let text = text.into();
        self.findings.push(Finding { level, about, text });
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for Finding { level, about, text } in &self.findings {
            let mark = match level {
                Level::Good => "ok",
                Level::Note => "--",
                Level::Wrong => "!!",
            };
            writeln!(f, "{mark}  {about:8} {text}")?;
        }
        match self.usable() {
            true => writeln!(
                f,
                "\nA worker can compute on a GPU here: set device = \"cuda\". Run `baton gpu-check` first."
            ),
            false => writeln!(
                f,
                "\nNo worker can compute on a GPU here. Workers on the CPU need none of this."
            ),
        }
    }
}

/// Looks at driver, devices, NVRTC, peer access and NCCL.
pub fn examine() -> Report {
    let mut report = Report { findings: Vec::new() };
    let mut devices = Vec::new();
    let mut driver_version = 0;
    match cuda::devices() {
        Err(error) => report.add(Level::Wrong, "driver", error.to_string()),
        Ok((version, found)) => {
            driver_version = version;
            report.add(
                Level::Good,
                "driver",
                format!("supports CUDA {}.{}", version / 1000, version % 1000 / 10),
            );
            devices = found;
        }
    }
    if let Some(visible) = std::env::var_os("CUDA_VISIBLE_DEVICES") {
        let text = format!("CUDA_VISIBLE_DEVICES is {visible:?}: the driver shows this process no others");
        report.add(Level::Note, "devices", text);
    }
    if driver_version > 0 {
        describe_devices(&mut report, &devices);
    }
    let usable = devices.iter().find(|d| d.capability >= CAPABILITY_MIN);
    describe_nvrtc(&mut report, usable, driver_version);
    for (one, other) in pairs(devices.len()) {
        let reach = |from, to| cuda::peers(from, to).unwrap_or(false);
        let text = match (reach(one, other), reach(other, one)) {
            (true, true) => format!("GPUs {one} and {other} reach each other's memory"),
            _ => format!("GPUs {one} and {other} do not reach each other's memory; transfers go through the host"),
        };
        report.add(Level::Note, "peers", text);
    }
    describe_nccl(&mut report);
    report
}

fn pairs(count: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..count).flat_map(move |one| (one + 1..count).map(move |other| (one, other)))
}

fn describe_devices(report: &mut Report, devices: &[DeviceInfo]) {
    if devices.is_empty() {
        report.add(Level::Wrong, "devices", "the driver shows no GPU to this process");
    }
    let some = devices.iter().any(|d| d.capability >= CAPABILITY_MIN);
    for device in devices {
        let (major, minor) = device.capability;
        let what = format!(
            "GPU {}: {}, compute capability {major}.{minor}, {:.1} GiB, {} multiprocessors",
            device.ordinal,
            device.name,
            device.memory_bytes as f64 / (1u64 << 30) as f64,
            device.multiprocessors
        );
        match device.capability >= CAPABILITY_MIN {
            true => report.add(Level::Good, "devices", what),
            // One that is too old is no harm beside one that is not.
            false => report.add(
                if some { Level::Note } else { Level::Wrong },
                "devices",
                format!(
                    "{what}; the kernels need {}.{} or later",
                    CAPABILITY_MIN.0, CAPABILITY_MIN.1
                ),
            ),
        }
    }
}

fn describe_nvrtc(report: &mut Report, device: Option<&DeviceInfo>, driver_version: i32) {
    let found = Nvrtc::find().and_then(|nvrtc| Ok((nvrtc.name().to_owned(), nvrtc.version()?)));
    let (name, (major, minor)) = match found {
        Ok(found) => found,
        Err(error) => return report.add(Level::Wrong, "nvrtc", error.to_string()),
    };
    report.add(Level::Good, "nvrtc", format!("{name}, version {major}.{minor}"));
    if driver_version > 0 && major > driver_version / 1000 {
        let text = format!(
            "NVRTC {major} makes kernels that a driver for CUDA {} does not load; install an NVRTC {} or a newer driver",
            driver_version / 1000,
            driver_version / 1000
        );
        return report.add(Level::Wrong, "nvrtc", text);
    }
    // Whether it knows the architecture is best asked by compiling; the result is kept for the worker.
    let capability = device.map_or((9, 0), |d| d.capability);
    let compiled = Program::new(128, KvDtype::Bf16)
        .map_err(DeviceError::Unavailable)
        .and_then(|program| cache::compiled(&program, capability, cache::folder().as_deref()));
    match compiled {
        Ok(_) => report.add(Level::Good, "kernels", format!("compile for {}", target(capability))),
        Err(error) => report.add(Level::Wrong, "kernels", error.to_string()),
    }
}

#[allow(unsafe_code)]
fn describe_nccl(report: &mut Report) {
    // SAFETY: NVIDIA's library, found by the system's rules; its initialisers have no conditions.
    let library = unsafe { libloading::Library::new(NCCL) };
    let text = match library {
        Err(_) => format!("{NCCL} is not found; nothing needs it yet"),
        Ok(library) => {
            let mut version = 0i32;
            // SAFETY: the function has this type since NCCL 2.3.
            let code = unsafe { library.get::<unsafe extern "C" fn(*mut i32) -> i32>(b"ncclGetVersion\0") }
                .map(|get| unsafe { get(&mut version) });
            match code {
                Ok(0) => format!("{NCCL}, version code {version}; nothing needs it yet"),
                _ => format!("{NCCL} is found but tells no version"),
            }
        }
    };
    report.add(Level::Note, "nccl", text);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_machine_gets_a_report_that_says_what_is_missing() {
        let report = examine();
        let text = report.to_string();
        for about in ["driver", "nvrtc", "nccl"] {
            assert!(report.findings.iter().any(|f| f.about == about), "{text}");
        }
        if !cuda::is_present() {
            assert!(!report.usable());
            assert!(
                text.contains("libcuda.so.1") && text.contains("No worker can compute on a GPU"),
                "{text}"
            );
        }
    }

    #[test]
    fn an_old_device_is_wrong_only_if_it_is_alone() {
        let device = |ordinal, capability| DeviceInfo {
            ordinal,
            name: "a GPU".into(),
            capability,
            multiprocessors: 1,
            memory_bytes: 1 << 30,
            shared_bytes_max: 0,
        };
        let usable = |devices: &[DeviceInfo]| {
            let mut report = Report { findings: Vec::new() };
            describe_devices(&mut report, devices);
            report.usable()
        };
        assert!(!usable(&[]) && !usable(&[device(0, (7, 5))]));
        assert!(usable(&[device(0, (7, 5)), device(1, (8, 9))]) && usable(&[device(0, (12, 0))]));
        assert_eq!(pairs(3).collect::<Vec<_>>(), [(0, 1), (0, 2), (1, 2)]);
    }
}
