// Pixels and ids become colours. Pure: typed arrays in, ImageData out.

const SELECTED = [255, 255, 255];

/** Channels added, each in its colour: `planes` and `channels` go together. */
export function paintChannels(planes, channels, height, width) {
  const picture = new ImageData(width, height);
  const out = new Uint32Array(picture.data.buffer).fill(255 << 24);
  planes.forEach(({ data, stride }, number) => {
    const { low, high } = channels[number];
    const whole = data instanceof Uint8Array || data instanceof Uint16Array;
    const table = colours(channels[number], whole ? 256 ** data.BYTES_PER_ELEMENT : 0);
    const factor = high > low ? (STEPS - 1) / (high - low) : 0;
    for (let y = 0, i = 0; y < height; y++) {
      for (let at = y * stride, end = at + width; at < end; at++, i++) {
        const place = whole ? data[at] : Math.min((data[at] - low) * factor, STEPS - 1);
        out[i] = brighter(out[i], table[place > 0 ? place | 0 : 0]); // NaN is low
      }
    }
  });
  return picture;
}

const STEPS = 65_536; // of light, where values are not whole numbers
const tables = new Map();

/** Packed colours: of each of so many whole values, or, of none, of STEPS values from low to high. */
function colours({ low, high, colour }, values) {
  const key = `${low} ${high} ${colour} ${values}`;
  if (!tables.has(key)) {
    if (tables.size > 16) tables.clear();
    const rgb = [1, 3, 5].map((i) => parseInt(colour.slice(i, i + 2), 16));
    const [from, to] = values ? [low, high] : [0, STEPS - 1];
    const table = new Uint32Array(values || STEPS);
    for (let value = 0; value < table.length; value++) {
      const light = to > from && value > from ? Math.min((value - from) / (to - from), 1) : 0;
      table[value] = packed(rgb.map((n) => Math.round(n * light)));
    }
    tables.set(key, table);
  }
  return tables.get(key);
}

/** Two packed opaque colours added, each of red, green and blue up to 255. Red and blue at once: there
 * is room between them for what is carried, and a carry becomes 255. */
function brighter(one, other) {
  let redBlue = (one & 0xff00ff) + (other & 0xff00ff);
  let green = (one & 0xff00) + (other & 0xff00);
  const carried = redBlue & 0x1000100;
  redBlue |= carried - (carried >>> 8);
  if (green > 0xff00) green = 0xff00;
  return (255 << 24) | (redBlue & 0xff00ff) | green;
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

/** What stands where a tile cannot be read, an ImageBitmap: never black, never empty. */
export function paintLost(height, width) {
  const canvas = new OffscreenCanvas(width, height);
  const context = canvas.getContext("2d");
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
  return canvas.transferToImageBitmap();
}
