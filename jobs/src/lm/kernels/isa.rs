//! What the processor can do, found at run time. Owns the only way to an [`Isa`]: who has one may use its instructions.

/// An instruction set that this processor has.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Isa(Set);

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Set {
    /// AVX-512 F, VL, BW, DQ and VNNI, beside those of `Avx2`.
    #[cfg(target_arch = "x86_64")]
    Avx512,
    /// AVX2, FMA and F16C.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    Plain,
}

impl Isa {
    /// All that this processor has, the best first.
    pub fn available() -> Vec<Self> {
        let mut found = Vec::new();
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c") {
            let has_512 = is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq");
            if has_512 && is_x86_feature_detected!("avx512vnni") {
                found.push(Self(Set::Avx512));
            }
            found.push(Self(Set::Avx2));
        }
        found.push(Self(Set::Plain));
        found
    }

    pub fn best() -> Self {
        Self::available()[0]
    }

    pub(super) fn set(self) -> Set {
        self.0
    }

    /// Runs work that is compiled for this instruction set: all of it must be inlined into the call, or it is slow.
    #[inline(always)]
    pub fn run<R>(self, work: impl FnOnce() -> R) -> R {
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512vl,avx512vnni,avx512bw,avx512dq")]
        unsafe fn avx512<R>(work: impl FnOnce() -> R) -> R {
            work()
        }
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx2,fma,f16c")]
        unsafe fn avx2<R>(work: impl FnOnce() -> R) -> R {
            work()
        }
        match self.0 {
            // SAFETY: `available` has found the instructions.
            #[cfg(target_arch = "x86_64")]
            Set::Avx512 => unsafe { avx512(work) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Set::Avx2 => unsafe { avx2(work) },
            Set::Plain => work(),
        }
    }
}
