// Stands for the WebAssembly codecs of numcodecs: segpipe writes zstd only.
export default {
  fromConfig() {
    throw new Error("blosc and lz4 cannot be shown; segpipe writes zstd");
  },
};
