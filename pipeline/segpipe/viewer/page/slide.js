// An image and its labels, read from the OME-Zarr that segpipe wrote.

import { FetchStore, decompress, open, registry } from "./vendor/zarr.js";

const KEPT_CHUNKS = 96; // of labels, 1 MB each: a tile needs the edges of its neighbours

registry.set("zstd", () => ({
  fromConfig: () => ({ kind: "bytes_to_bytes", decode: (bytes) => decompress(bytes) }),
}));
// zarrita's own takes the checksum off and does not look at it.
registry.set("crc32c", () => ({
  fromConfig: () => ({ kind: "bytes_to_bytes", decode: checked, computeEncodedSize: (n) => n + 4 }),
}));

const CRC = Uint32Array.from({ length: 256 }, (_, n) => {
  for (let bit = 0; bit < 8; bit++) n = n & 1 ? (n >>> 1) ^ 0x82f63b78 : n >>> 1;
  return n;
});

function checked(bytes) {
  const end = bytes.length - 4;
  let crc = -1;
  for (let i = 0; i < end; i++) crc = (crc >>> 8) ^ CRC[(crc ^ bytes[i]) & 255];
  const told = new DataView(bytes.buffer, bytes.byteOffset + end, 4).getUint32(0, true);
  if (~crc >>> 0 !== told) throw new Error("its checksum is wrong");
  return bytes.subarray(0, end);
}

/** Opens the OME-Zarr below `url`; labels are null when there are none yet. */
export async function openSlide(url, labelled) {
  const store = new FetchStore(url, { useSuffixRequest: true, fetch: ask });
  const group = await open.v3(store, { kind: "group" });
  const { multiscales, omero } = group.attrs.ome;
  const image = await openPyramid(group, multiscales[0]);
  const labels = labelled ? await openLabels(group) : null;
  const finest = Number(multiscales[0].datasets[0].path); // above 0: the image was not copied
  return new Slide(image, labels, omero.channels, pixelSizeUm(multiscales[0]), 2 ** finest);
}

/** A server that does not know ranges would send whole files, which decode to nonsense. */
async function ask(request) {
  const response = await fetch(request);
  if (request.headers.has("Range") && response.status === 200) throw new Error("the server ignores ranges");
  return response;
}

async function openLabels(group) {
  const labels = await open.v3(group.resolve("labels/instances"), { kind: "group" });
  return openPyramid(labels, labels.attrs.ome.multiscales[0]);
}

async function openPyramid(group, multiscale) {
  const paths = multiscale.datasets.map(({ path }) => path);
  const arrays = await Promise.all(paths.map((path) => open.v3(group.resolve(path), { kind: "array" })));
  return new Pyramid(arrays);
}

function pixelSizeUm({ axes, datasets }) {
  const x = axes.findIndex(({ name }) => name === "x");
  const { scale } = datasets[0].coordinateTransformations.find(({ type }) => type === "scale");
  return axes[x].unit === "micrometer" ? scale[x] : null;
}

/** Arrays of one image, finest first: each of ceil(n / 2) pixels a side of the one before. */
class Pyramid {
  constructor(arrays) {
    this.arrays = arrays;
    const [height, width] = arrays[0].shape.slice(-2);
    this.tile = arrays[0].chunks.slice(-2);
    arrays.forEach((array, level) => {
      const shape = [height, width].map((n) => Math.ceil(n / 2 ** level));
      const chunk = shape.map((n, axis) => Math.min(n, this.tile[axis]));
      if (`${array.shape.slice(-2)} ${array.chunks.slice(-2)}` !== `${shape} ${chunk}`)
        throw new Error(`level ${level} is not as segpipe writes it`);
    });
  }

  shape(level) {
    return this.arrays[level].shape.slice(-2);
  }

  /** Height and width of a tile; those at the lower and right border are smaller. */
  extent(level, y, x) {
    const [height, width] = this.shape(level);
    return [Math.min(this.tile[0], height - y * this.tile[0]), Math.min(this.tile[1], width - x * this.tile[1])];
  }

  /** One chunk: { data, stride }, which may be larger than the tile. No signal: chunks share the index
   * of their shard, and to abort one of them would fail the others. */
  async chunk(level, channel, y, x) {
    const { data, stride } = await this.arrays[level].getChunk([...channel, y, x]);
    return { data, stride: stride.at(-2) };
  }
}

class Slide {
  /** `step`: pixels of the labels for one of the image. */
  constructor(image, labels, channels, pixelSizeUm, step) {
    Object.assign(this, { image, labels, pixelSizeUm, step });
    [this.height, this.width] = image.shape(0);
    this.levels = image.arrays.length;
    this.dtype = image.arrays[0].dtype;
    this.channels = channels.map(({ label, color, active, window }) => ({
      label, colour: `#${color}`, active, low: window.start, high: window.end, least: window.min, most: window.max,
    }));
    this.chunks = new Map();
  }

  /** Pixels of one channel in a tile: { data, stride, height, width }. */
  async plane(level, channel, y, x) {
    const [height, width] = this.image.extent(level, y, x);
    return { ...(await this.image.chunk(level, [channel], y, x)), height, width };
  }

  /** Ids in a tile and one pixel around it, (height + 2) x (width + 2); beyond the image those at its
   * border, so that neither a tile's border nor the image's is an edge of an object. */
  async ids(level, y, x) {
    const [height, width] = this.labels.extent(level, y, x);
    const [rows, columns] = this.labels.shape(level).map((n, axis) => Math.ceil(n / this.labels.tile[axis]));
    const at = (v, u) => (v >= 0 && u >= 0 && v < rows && u < columns ? this.labelChunk(level, v, u) : null);
    const [own, above, below, left, right] = await Promise.all(
      [at(y, x), at(y - 1, x), at(y + 1, x), at(y, x - 1), at(y, x + 1)],
    );
    const stride = width + 2;
    const ids = new Uint32Array((height + 2) * stride);
    const copyRow = (chunk, from, to) => {
      const start = from * chunk.stride;
      ids.set(chunk.data.subarray(start, start + width), to * stride + 1);
    };
    const copyColumn = (chunk, from, to) => {
      for (let row = 0; row < height; row++) ids[(row + 1) * stride + to] = chunk.data[row * chunk.stride + from];
    };
    for (let row = 0; row < height; row++) copyRow(own, row, row + 1);
    copyRow(above ?? own, above ? this.labels.tile[0] - 1 : 0, 0);
    copyRow(below ?? own, below ? 0 : height - 1, height + 1);
    copyColumn(left ?? own, left ? this.labels.tile[1] - 1 : 0, 0);
    copyColumn(right ?? own, right ? 0 : width - 1, width + 1);
    return { ids, height, width };
  }

  /** The id of the object at a pixel of level 0; 0 for none. */
  async idAt(y, x) {
    const [height, width] = this.labels.tile;
    const chunk = await this.labelChunk(0, Math.floor(y / height), Math.floor(x / width));
    return chunk.data[(y % height) * chunk.stride + (x % width)];
  }

  labelChunk(level, y, x) {
    const key = `${level}/${y}/${x}`;
    const found = this.chunks.get(key) ?? this.labels.chunk(level, [], y, x);
    this.chunks.delete(key); // those used last are at the end
    this.chunks.set(key, found);
    found.catch(() => this.chunks.delete(key));
    if (this.chunks.size > KEPT_CHUNKS) this.chunks.delete(this.chunks.keys().next().value);
    return found;
  }
}
