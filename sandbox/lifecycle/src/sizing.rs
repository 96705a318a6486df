//! How large a pod's VM is.
//!
//! kubelet sums only the containers that have limits, and gives the pod's cgroup a `memory.max` only when all have. So the cgroup's
//! effective `memory.max`, less what VMM and helpers need, is a ceiling; the sum of limits plus what kernel and agent need is a floor.
//! Without a ceiling the configured default applies, and the floor when that is higher.

use serde::{Deserialize, Serialize};

const MIB: u64 = 1 << 20;

/// Fewest MiB in which kernel and agent come up.
pub const MEMORY_MIN_MIB: u64 = 64;

/// What is known about a pod before it boots. `None`: no such limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Demand {
    /// Sum of the containers' memory limits, bytes.
    pub limit_bytes: Option<u64>,
    /// Sum of the containers' CPU limits, thousandths.
    pub limit_cpu_milli: Option<u64>,
    /// Effective `memory.max` of the pod's cgroup (the lowest on the way to the root), bytes.
    pub cgroup_max_bytes: Option<u64>,
}

/// What the node's administrator has decided.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Policy {
    /// Memory without a ceiling, MiB.
    pub default_memory_mib: u64,
    /// vCPUs without limits.
    pub default_vcpus: u32,
    /// What kernel and agent take of the VM's memory, MiB.
    pub guest_overhead_mib: u64,
    /// What VMM and helpers take of the cgroup's memory, MiB.
    pub host_reserve_mib: u64,
    /// Most vCPUs that a VM may have; normally the CPUs of the host.
    pub max_vcpus: u32,
}

/// The size of a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmSize {
    /// Memory, MiB.
    pub memory_mib: u64,
    /// vCPUs.
    pub vcpus: u32,
}

/// A pod that no VM fits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SizeError {
    /// The limits need more than the pod's cgroup has.
    #[error(
        "the containers' limits and the guest's own {overhead_mib} MiB need {floor_mib} MiB, but the pod's cgroup leaves {ceiling_mib} MiB \
         after {reserve_mib} MiB for the VMM"
    )]
    FloorOverCeiling {
        /// Limits and overhead.
        floor_mib: u64,
        /// `memory.max` less the reserve.
        ceiling_mib: u64,
        /// [`Policy::guest_overhead_mib`].
        overhead_mib: u64,
        /// [`Policy::host_reserve_mib`].
        reserve_mib: u64,
    },
    /// The pod's cgroup has less than any VM needs.
    #[error(
        "the pod's cgroup leaves {ceiling_mib} MiB after {reserve_mib} MiB for the VMM, and a VM needs {MEMORY_MIN_MIB} MiB"
    )]
    CeilingTooLow {
        /// `memory.max` less the reserve.
        ceiling_mib: u64,
        /// [`Policy::host_reserve_mib`].
        reserve_mib: u64,
    },
}

/// Sizes a VM, or says which numbers disagree.
pub fn size(demand: Demand, policy: Policy) -> Result<VmSize, SizeError> {
    let limits_mib = demand.limit_bytes.map(|bytes| bytes.div_ceil(MIB));
    let floor_mib = limits_mib
        .map_or(0, |mib| mib.saturating_add(policy.guest_overhead_mib))
        .max(MEMORY_MIN_MIB);
    let memory_mib = match demand.cgroup_max_bytes {
        Some(bytes) => {
            let reserve_mib = policy.host_reserve_mib;
            let ceiling_mib = (bytes / MIB).saturating_sub(reserve_mib);
            if ceiling_mib < MEMORY_MIN_MIB {
                return Err(SizeError::CeilingTooLow {
                    ceiling_mib,
                    reserve_mib,
                });
            }
            if floor_mib > ceiling_mib {
                return Err(SizeError::FloorOverCeiling {
                    floor_mib,
                    ceiling_mib,
                    overhead_mib: policy.guest_overhead_mib,
                    reserve_mib,
                });
            }
            ceiling_mib
        }
        None => floor_mib.max(policy.default_memory_mib),
    };
    let wanted = demand
        .limit_cpu_milli
        .filter(|milli| *milli > 0)
        .map_or(policy.default_vcpus, |milli| {
            u32::try_from(milli.div_ceil(1000)).unwrap_or(u32::MAX)
        });
    Ok(VmSize {
        memory_mib,
        vcpus: wanted.clamp(1, policy.max_vcpus.max(1)),
    })
}

/// How far VMs may grow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Most {
    /// Memory, MiB.
    pub memory_mib: u64,
    /// vCPUs; `None`: those of the boot.
    pub vcpus: Option<u32>,
    /// CPUs of the host; no VM has more.
    pub host_cpus: u32,
}

/// What a VM of this size may grow to. Each possible CPU costs the guest memory (8 cost 2 MiB, 64 cost 16), so none is there unless asked for.
#[must_use]
pub fn ceiling(size: VmSize, most: Most) -> VmSize {
    let vcpus = most.vcpus.unwrap_or(size.vcpus);
    VmSize {
        memory_mib: most.memory_mib.max(size.memory_mib),
        vcpus: vcpus.min(most.host_cpus).max(size.vcpus),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const POLICY: Policy = Policy {
        default_memory_mib: 512,
        default_vcpus: 2,
        guest_overhead_mib: 40,
        host_reserve_mib: 30,
        max_vcpus: 8,
    };

    fn demand(limit_mib: Option<u64>, cpu: Option<u64>, cgroup_mib: Option<u64>) -> Demand {
        Demand {
            limit_bytes: limit_mib.map(|m| m * MIB),
            limit_cpu_milli: cpu,
            cgroup_max_bytes: cgroup_mib.map(|m| m * MIB),
        }
    }

    #[test]
    fn without_limits_the_defaults_apply() {
        assert_eq!(
            size(demand(None, None, None), POLICY),
            Ok(VmSize {
                memory_mib: 512,
                vcpus: 2
            })
        );
    }

    #[test]
    fn mixed_limits_raise_the_default_but_never_lower_it() {
        // kubelet sums the containers that have limits, and sets no memory.max, since one has none.
        assert_eq!(
            size(demand(Some(128), Some(250), None), POLICY),
            Ok(VmSize {
                memory_mib: 512,
                vcpus: 1
            })
        );
        assert_eq!(
            size(demand(Some(900), Some(2500), None), POLICY),
            Ok(VmSize {
                memory_mib: 940,
                vcpus: 3
            })
        );
    }

    #[test]
    fn with_all_limits_the_cgroup_is_the_ceiling() {
        let error = size(demand(Some(256), Some(1000), Some(256)), POLICY).unwrap_err();
        assert!(error.to_string().contains("need 296 MiB"), "{error}");
        assert_eq!(
            size(demand(Some(256), Some(1000), Some(330)), POLICY),
            Ok(VmSize {
                memory_mib: 300,
                vcpus: 1
            })
        );
    }

    #[test]
    fn a_cgroup_too_small_for_any_vm_is_refused() {
        assert_eq!(
            size(demand(None, None, Some(80)), POLICY),
            Err(SizeError::CeilingTooLow {
                ceiling_mib: 50,
                reserve_mib: 30
            })
        );
    }

    #[test]
    fn vcpus_never_exceed_what_the_host_has() {
        assert_eq!(size(demand(None, Some(64_000), None), POLICY).unwrap().vcpus, 8);
        assert_eq!(size(demand(None, Some(0), None), POLICY).unwrap().vcpus, 2);
    }

    #[test]
    fn a_vm_may_grow_to_what_is_allowed_and_the_host_has() {
        let most = |vcpus| Most {
            memory_mib: 4096,
            vcpus,
            host_cpus: 16,
        };
        let size = |memory_mib, vcpus| VmSize { memory_mib, vcpus };
        assert_eq!(ceiling(size(512, 1), most(None)), size(4096, 1));
        assert_eq!(ceiling(size(8192, 4), most(Some(3))), size(8192, 4));
        assert_eq!(ceiling(size(512, 1), most(Some(64))), size(4096, 16));
    }

    proptest! {
        #[test]
        fn every_size_holds_the_limits_and_stays_under_the_ceiling(
            limit in proptest::option::of(0_u64..1 << 50), cpu in proptest::option::of(any::<u64>()),
            cgroup in proptest::option::of(any::<u64>()),
        ) {
            let demand = Demand { limit_bytes: limit, limit_cpu_milli: cpu, cgroup_max_bytes: cgroup };
            if let Ok(got) = size(demand, POLICY) {
                prop_assert!(got.vcpus >= 1 && got.vcpus <= POLICY.max_vcpus);
                prop_assert!(got.memory_mib >= MEMORY_MIN_MIB);
                if let Some(limit) = limit {
                    prop_assert!((got.memory_mib - POLICY.guest_overhead_mib) * MIB >= limit);
                }
                if let Some(cgroup) = cgroup {
                    prop_assert!(got.memory_mib + POLICY.host_reserve_mib <= cgroup / MIB);
                }
            } else {
                prop_assert!(cgroup.is_some());
            }
        }
    }
}
