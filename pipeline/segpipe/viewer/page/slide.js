// An image and its labels, read from the OME-Zarr that segpipe wrote.

import { FetchStore, decompress, open, registry } from "./vendor/zarr.js";

const KEPT_BYTES = 2 ** 27; // of decoded chunks of a pyramid: tiles are painted anew
const BESIDE = [[-1, 0], [1, 0], [0, -1], [0, 1]]; // above, below, left, right

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
    this.kept = new Map(); // chunks by place, those used last at the end: { chunk: a promise, bytes }
    this.bytes = 0;
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
  chunk(level, ...place) {
    const key = `${level}/${place}`;
    const entry = this.kept.get(key) ?? { chunk: this.read(level, place), bytes: 0 };
    this.kept.delete(key);
    this.kept.set(key, entry);
    return entry.chunk;
  }

  /** The same if it is read already, or is being read; null otherwise, and where it cannot be read. */
  async known(level, ...place) {
    return this.kept.get(`${level}/${place}`)?.chunk.catch(() => null) ?? null;
  }

  async read(level, place) {
    const key = `${level}/${place}`;
    try {
      const { data, stride } = await this.arrays[level].getChunk(place);
      this.keep(key, data.byteLength);
      return { data, stride: stride.at(-2) };
    } catch (error) {
      this.kept.delete(key); // it may be there the next time
      throw error;
    }
  }

  /** Notes the size of a chunk, and forgets those used longest ago where that is too much. */
  keep(key, bytes) {
    this.kept.get(key).bytes = bytes;
    this.bytes += bytes;
    for (const [other, { bytes }] of this.kept) {
      if (this.bytes <= KEPT_BYTES) break;
      if (bytes && other !== key) {
        this.bytes -= bytes;
        this.kept.delete(other);
      }
    }
  }

  /** What the page needs of it. */
  told() {
    const [height, width] = this.shape(0);
    return { height, width, tile: this.tile, levels: this.arrays.length };
  }
}

class Slide {
  /** `step`: pixels of the labels for one of the image. */
  constructor(image, labels, channels, pixelSizeUm, step) {
    Object.assign(this, { image, labels, pixelSizeUm, step });
    this.channels = channels.map(({ label, color, active, window }) => ({
      label, colour: `#${color}`, active, low: window.start, high: window.end, least: window.min, most: window.max,
    }));
    this.behind = new Map(); // by tile of labels: those beside it whose ids were given without it
  }

  /** What the page needs of it. */
  told() {
    const { channels, pixelSizeUm, step } = this;
    const dtype = this.image.arrays[0].dtype;
    return { image: this.image.told(), labels: this.labels?.told() ?? null, dtype, channels, pixelSizeUm, step };
  }

  /** Pixels of one channel in a tile, or more: { data, stride }. */
  plane(level, channel, y, x) {
    return this.image.chunk(level, channel, y, x);
  }

  /** Ids in a tile and one pixel around it, (height + 2) x (width + 2); beyond the image those at its
   * border, so that neither a tile's border nor the image's is an edge of an object.
   *
   * So too where a tile beside it has not been asked for: to read it only for its edge would make three
   * chunks of one. `behind` are the tiles, "level/y/x", that were given without this one. */
  async ids(level, y, x) {
    const [height, width] = this.labels.extent(level, y, x);
    const own = await this.labels.chunk(level, y, x);
    const beside = await Promise.all(BESIDE.map(([v, u]) => this.labels.known(level, y + v, x + u)));
    const place = `${level}/${y}/${x}`;
    BESIDE.forEach(([v, u], side) => {
      const other = `${level}/${y + v}/${x + u}`;
      if (!beside[side]) this.behind.set(other, (this.behind.get(other) ?? new Set()).add(place));
    });
    const behind = [...(this.behind.get(place) ?? [])];
    this.behind.delete(place);

    const [above, below, left, right] = beside;
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
    return { ids, height, width, behind };
  }

  /** The id of the object at a pixel of level 0; 0 for none. */
  async idAt(y, x) {
    const [height, width] = this.labels.tile;
    const chunk = await this.labels.chunk(0, Math.floor(y / height), Math.floor(x / width));
    return chunk.data[(y % height) * chunk.stride + (x % width)];
  }
}
