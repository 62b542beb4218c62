// Pixels and ids become colours. Pure: typed arrays in, ImageData out.

const SELECTED = [255, 255, 255];

/** Channels added, each in its colour: `planes` and `channels` go together. */
export function paintChannels(planes, channels) {
  const { height, width } = planes[0] ?? { height: 1, width: 1 };
  const picture = new ImageData(width, height);
  const out = picture.data;
  for (let i = 3; i < out.length; i += 4) out[i] = 255;
  planes.forEach(({ data, stride }, number) => {
    const { low, high, colour } = channels[number];
    const light = lightOf(data, low, high);
    const [red, green, blue] = [1, 3, 5].map((i) => parseInt(colour.slice(i, i + 2), 16) / 255);
    for (let y = 0, i = 0; y < height; y++) {
      for (let at = y * stride, end = at + width; at < end; at++, i += 4) {
        const value = light(data[at]);
        out[i] += value * red; // clamped: these are Uint8ClampedArray
        out[i + 1] += value * green;
        out[i + 2] += value * blue;
      }
    }
  });
  return picture;
}

/** 0 to 255 of a value between low and high, by a table where values are few; NaN is low. */
function lightOf(data, low, high) {
  const factor = high > low ? 255 / (high - low) : 0;
  const light = (value) => (value > low ? Math.min((value - low) * factor, 255) : 0);
  if (!(data instanceof Uint8Array || data instanceof Uint16Array)) return light;
  const table = Float32Array.from({ length: 256 ** data.BYTES_PER_ELEMENT }, (_, value) => light(value));
  return (value) => table[value];
}

/** Objects, each in a colour of its own: the pixels inside that touch another one, or all.
 * `ids` has a pixel more on each side. */
export function paintIds({ ids, height, width }, { mode, selected, palette }) {
  const picture = new ImageData(width, height);
  const out = new Uint32Array(picture.data.buffer);
  const stride = width + 2;
  let last = 0;
  let paint = 0;
  for (let y = 0, i = 0; y < height; y++) {
    for (let at = (y + 1) * stride + 1, end = at + width; at < end; at++, i++) {
      const id = ids[at];
      if (id === 0) continue;
      const inner =
        ids[at - 1] === id && ids[at + 1] === id && ids[at - stride] === id && ids[at + stride] === id;
      if (inner && mode === "outlines") continue;
      if (id !== last) [last, paint] = [id, packed(colourOf(id, palette))];
      out[i] = id === selected && !inner ? packed(SELECTED) : paint;
    }
  }
  return picture;
}

const packed = ([red, green, blue]) => (255 << 24) | (blue << 16) | (green << 8) | red;

const numbers = new Map();

/** The colour of an id, the same as in segpipe's pictures (export/drawing.py). */
export function colourOf(id, palette) {
  let number = numbers.get(id);
  if (number === undefined) {
    const mixed = (BigInt(id) * 0x9e3779b97f4a7c15n) & 0xffffffffffffffffn;
    number = Number((mixed >> 33n) % BigInt(palette.length));
    if (numbers.size > 1e6) numbers.clear();
    numbers.set(id, number);
  }
  return palette[number];
}

/** What stands where a tile cannot be read: never black, never empty. */
export function paintLost(context) {
  const { width, height } = context.canvas;
  context.fillStyle = "#3b1512";
  context.fillRect(0, 0, width, height);
  context.strokeStyle = "#ff6b5e";
  context.lineWidth = 3;
  for (let x = -height; x < width; x += 24) {
    context.beginPath();
    context.moveTo(x, height);
    context.lineTo(x + height, 0);
    context.stroke();
  }
}
