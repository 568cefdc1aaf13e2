//! Builds the kernel program with clang. Without clang the crate builds all the same, and says at run time that it has no kernel program.
//!
//! `FARM_CLANG` names the compiler (`clang` by default); `FARM_CLANG=none` builds without the kernel program on purpose. With `FARM_NEED_BPF` set it is an error if a clang that
//! is there cannot build it.

use std::env;
use std::path::PathBuf;
use std::process::Command;

fn main() {
    println!("cargo::rerun-if-changed=bpf");
    println!("cargo::rerun-if-env-changed=FARM_CLANG");
    println!("cargo::rerun-if-env-changed=FARM_NEED_BPF");
    println!("cargo::rustc-check-cfg=cfg(farm_bpf)");
    let clang = env::var("FARM_CLANG").unwrap_or_else(|_| "clang".to_owned());
    let Some(out) = env::var_os("OUT_DIR").map(PathBuf::from) else {
        return;
    };
    if clang == "none" {
        return;
    }
    let endian = env::var("CARGO_CFG_TARGET_ENDIAN").unwrap_or_default();
    let target = if endian == "big" { "bpfeb" } else { "bpfel" };
    let built = Command::new(&clang)
        .args([
            "-target", target, "-mcpu=v3", "-O2", "-g", "-Wall", "-Wextra", "-Werror",
        ])
        // The headers of no host: what differs between machines is in bpf/machine, and is the same for every host.
        .arg("-Ibpf/machine")
        // The same bytes from every folder.
        .args(["-ffile-prefix-map=bpf=.", "-c", "bpf/farm.bpf.c", "-o"])
        .arg(out.join("farm.bpf.o"))
        .output();
    match built {
        Ok(output) if output.status.success() => println!("cargo::rustc-cfg=farm_bpf"),
        Ok(output) => {
            for line in String::from_utf8_lossy(&output.stderr).lines() {
                println!("cargo::warning={line}");
            }
            let kind = match env::var_os("FARM_NEED_BPF") {
                Some(_) => "error",
                None => "warning",
            };
            println!(
                "cargo::{kind}={clang} cannot build the kernel program farmd/sys/bpf/farm.bpf.c, for which it needs to be version 11 or newer with the bpf back end, \
                 and the kernel's headers (apt-get install clang linux-libc-dev): farmd has none then, and its raw data plane does all. FARM_CLANG names another \
                 clang; FARM_CLANG=none says that this is meant"
            );
        }
        Err(error) => {
            println!(
                "cargo::warning={clang}: {error}; farmd is built without its kernel program (apt-get install clang linux-libc-dev), its raw data plane does \
                 all. FARM_CLANG=none says that this is meant"
            );
        }
    }
}
