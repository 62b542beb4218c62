// What the page uses of zarrita, with fzstd for zstd: numcodecs' own is WebAssembly, which the
// page's content security policy does not allow, and 1.3 MB more.
export { FetchStore, open, registry } from "zarrita";
export { decompress } from "fzstd";
