//! Finding NCCL and its symbols.

use std::ffi::{CStr, OsStr, c_char, c_int, c_uint, c_void};
use std::fmt;
use std::mem::ManuallyDrop;
use std::path::Path;
use std::sync::Arc;

use libloading::Library;

use super::{Code, NcclError};

/// What NCCL calls its communicators.
pub(super) type Handle = *mut c_void;

/// Names in the order in which they are tried. Wheels and packages ship the first.
const NAMES: [&str; 2] = ["libnccl.so.2", "libnccl.so"];
const MAGIC: c_uint = 0xcafe_beef;
const UNDEFINED: c_int = c_int::MIN;
pub(super) const SUCCESS: c_int = 0;
pub(super) const IN_PROGRESS: c_int = 7;
pub(super) const SUM: c_int = 0;

/// `ncclUniqueId`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct RawId(pub(super) [u8; 128]);

/// `ncclConfig_t` as of 2.27. Later versions append fields, and take what a shorter one lacks as
/// undefined.
#[repr(C)]
pub(super) struct Config {
    size: usize,
    magic: c_uint,
    version: c_uint,
    blocking: c_int,
    cga_cluster_size: c_int,
    min_ctas: c_int,
    max_ctas: c_int,
    net_name: *const c_char,
    split_share: c_int,
    traffic_class: c_int,
    comm_name: *const c_char,
    collnet_enable: c_int,
    cta_policy: c_int,
    shrink_share: c_int,
    nvls_ctas: c_int,
}

impl Config {
    /// Calls do not block; all else is left to NCCL.
    pub(super) fn not_blocking() -> Config {
        Config {
            size: size_of::<Config>(),
            magic: MAGIC,
            version: LEAST.0 as c_uint,
            blocking: 0,
            cga_cluster_size: UNDEFINED,
            min_ctas: UNDEFINED,
            max_ctas: UNDEFINED,
            net_name: std::ptr::null(),
            split_share: UNDEFINED,
            traffic_class: UNDEFINED,
            comm_name: std::ptr::null(),
            collnet_enable: UNDEFINED,
            cta_policy: UNDEFINED,
            shrink_share: UNDEFINED,
            nvls_ctas: UNDEFINED,
        }
    }
}

/// A version as NCCL counts: 22703 is 2.27.3.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version(pub u32);

impl fmt::Display for Version {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}.{}.{}", self.0 / 10_000, self.0 / 100 % 100, self.0 % 100)
    }
}

/// The oldest version that is used: the first with windows, shrinking and the form above.
const LEAST: Version = Version(22_700);
/// The next major version may change anything.
const BELOW: Version = Version(30_000);

/// What only some supported versions have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Extra {
    /// `ncclCommWindowRegister` (2.27): buffers known to all ranks.
    Windows,
    /// `ncclAlltoAll` (2.28): for experts divided whole.
    AllToAll,
    /// `ncclCommRevoke` (2.29): stops what is under way and keeps the communicator.
    Revoke,
}

impl Extra {
    /// The symbol it takes, and the first version whose symbol is trusted.
    fn needs(self) -> (&'static CStr, Version) {
        match self {
            Self::Windows => (c"ncclCommWindowRegister", Version(22_700)),
            Self::AllToAll => (c"ncclAlltoAll", Version(22_800)),
            Self::Revoke => (c"ncclCommRevoke", Version(22_900)),
        }
    }
}

type GetVersion = unsafe extern "C" fn(*mut c_int) -> c_int;
type GetUniqueId = unsafe extern "C" fn(*mut RawId) -> c_int;
type Init = unsafe extern "C" fn(*mut Handle, c_int, RawId, c_int, *mut Config) -> c_int;
type OfHandle = unsafe extern "C" fn(Handle) -> c_int;
type AsyncError = unsafe extern "C" fn(Handle, *mut c_int) -> c_int;
type ErrorString = unsafe extern "C" fn(c_int) -> *const c_char;
type LastError = unsafe extern "C" fn(Handle) -> *const c_char;
type AllReduce = unsafe extern "C" fn(
    *const c_void,
    *mut c_void,
    usize,
    c_int,
    c_int,
    Handle,
    *mut c_void,
) -> c_int;
type AllGather =
    unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, Handle, *mut c_void) -> c_int;

/// The symbols that every supported version has.
pub(super) struct Api {
    pub(super) get_unique_id: GetUniqueId,
    pub(super) init: Init,
    pub(super) async_error: AsyncError,
    pub(super) abort: OfHandle,
    pub(super) finalize: OfHandle,
    pub(super) destroy: OfHandle,
    pub(super) all_reduce: AllReduce,
    pub(super) all_gather: AllGather,
    error_string: ErrorString,
    last_error: LastError,
    version: Version,
    // Never unloaded: its threads may run for as long as the process does.
    library: ManuallyDrop<Library>,
}

/// A loaded NCCL. Clones share it; it stays loaded until the process ends.
#[derive(Clone)]
pub struct Nccl {
    pub(super) api: Arc<Api>,
}

impl fmt::Debug for Nccl {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "Nccl({})", self.version())
    }
}

impl Nccl {
    /// Loads NCCL from a file, or by its usual names where the system looks for libraries.
    ///
    /// # Errors
    /// `Unavailable`, `Version`, `Symbol`, `Call`.
    pub fn load(path: Option<&Path>) -> Result<Nccl, NcclError> {
        let names: Vec<&OsStr> = match path {
            Some(path) => vec![path.as_os_str()],
            None => NAMES.iter().map(OsStr::new).collect(),
        };
        let mut reason = String::new();
        for name in &names {
            // SAFETY: loading runs the library's initialisers. It is NCCL, or what the operator has
            // put in its place, and is as trusted as this program.
            match unsafe { Library::new(*name) } {
                Ok(library) => return Self::bind(library),
                Err(error) => reason = error.to_string(),
            }
        }
        let tried = names.iter().map(|name| name.to_string_lossy().into_owned()).collect();
        Err(NcclError::Unavailable { tried, reason })
    }

    fn bind(library: Library) -> Result<Nccl, NcclError> {
        let get_version: GetVersion = symbol(&library, c"ncclGetVersion", "ncclGetVersion")?;
        let mut code = 0;
        // SAFETY: the signature is NCCL's, and `code` lives through the call.
        let result = unsafe { get_version(&raw mut code) };
        let got = Version(u32::try_from(code).unwrap_or(0));
        if result != SUCCESS {
            let (call, code) = ("ncclGetVersion", code_of(result));
            return Err(NcclError::Call { call, code, text: String::new() });
        }
        if !(LEAST..BELOW).contains(&got) {
            return Err(NcclError::Version { got, least: LEAST, below: BELOW });
        }
        let api = Api {
            get_unique_id: symbol(&library, c"ncclGetUniqueId", "ncclGetUniqueId")?,
            init: symbol(&library, c"ncclCommInitRankConfig", "ncclCommInitRankConfig")?,
            async_error: symbol(&library, c"ncclCommGetAsyncError", "ncclCommGetAsyncError")?,
            abort: symbol(&library, c"ncclCommAbort", "ncclCommAbort")?,
            finalize: symbol(&library, c"ncclCommFinalize", "ncclCommFinalize")?,
            destroy: symbol(&library, c"ncclCommDestroy", "ncclCommDestroy")?,
            all_reduce: symbol(&library, c"ncclAllReduce", "ncclAllReduce")?,
            all_gather: symbol(&library, c"ncclAllGather", "ncclAllGather")?,
            error_string: symbol(&library, c"ncclGetErrorString", "ncclGetErrorString")?,
            last_error: symbol(&library, c"ncclGetLastError", "ncclGetLastError")?,
            version: got,
            library: ManuallyDrop::new(library),
        };
        Ok(Nccl { api: Arc::new(api) })
    }

    /// Its version.
    pub fn version(&self) -> Version {
        self.api.version
    }

    /// Whether this version has it: new enough, and the symbol is there.
    pub fn has(&self, extra: Extra) -> bool {
        let (name, since) = extra.needs();
        // SAFETY: only asked for, never called.
        self.version() >= since && unsafe { self.api.library.get::<*const c_void>(name) }.is_ok()
    }

    /// A new id, which NCCL listens for in this process.
    pub(super) fn unique_id(&self) -> Result<RawId, NcclError> {
        let mut id = RawId([0; 128]);
        // SAFETY: the signature is NCCL's, and `id` lives through the call.
        let result = unsafe { (self.api.get_unique_id)(&raw mut id) };
        if result == SUCCESS { Ok(id) } else { Err(self.refused("ncclGetUniqueId", result, None)) }
    }

    /// The error of a call that was refused.
    pub(super) fn refused(
        &self,
        call: &'static str,
        result: c_int,
        handle: Option<Handle>,
    ) -> NcclError {
        NcclError::Call { call, code: code_of(result), text: self.text(result, handle) }
    }

    /// What NCCL says of a result: its last error where it has one, else the code's name.
    pub(super) fn text(&self, result: c_int, handle: Option<Handle>) -> String {
        // SAFETY: NCCL takes no communicator as well (its last error is then of the process), and
        // `handle` is one that was not destroyed. Both give a C string or nothing.
        let last = unsafe { owned((self.api.last_error)(handle.unwrap_or(std::ptr::null_mut()))) };
        if !last.is_empty() {
            return last;
        }
        // SAFETY: as above; any number is taken.
        unsafe { owned((self.api.error_string)(result)) }
    }
}

/// The text at a pointer, short and without control characters.
///
/// # Safety
/// Null, or a C string that nobody changes meanwhile.
unsafe fn owned(text: *const c_char) -> String {
    if text.is_null() {
        return String::new();
    }
    // SAFETY: by the caller.
    let text = unsafe { CStr::from_ptr(text) }.to_string_lossy();
    text.trim().chars().filter(|c| !c.is_control()).take(400).collect()
}

/// A function of the library.
fn symbol<T: Copy>(library: &Library, name: &CStr, shown: &'static str) -> Result<T, NcclError> {
    // SAFETY: every caller asks for the type that NCCL's header gives the symbol.
    let found = unsafe { library.get::<T>(name) };
    found.map(|symbol| *symbol).map_err(|_| NcclError::Symbol { name: shown })
}

/// A result other than success.
pub(super) fn code_of(result: c_int) -> Code {
    match result {
        1 => Code::Cuda,
        2 => Code::System,
        3 => Code::Internal,
        4 => Code::Argument,
        5 => Code::Usage,
        6 => Code::Remote,
        IN_PROGRESS => Code::InProgress,
        8 => Code::Timeout,
        other => Code::Other(other),
    }
}
