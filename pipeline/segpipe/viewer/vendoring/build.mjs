// Writes ../page/vendor from node_modules: `npm ci && npm run build`. The same bytes every time.
import { copyFileSync, mkdirSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { build } from "esbuild";

const vendor = new URL("../page/vendor/", import.meta.url).pathname;
rmSync(vendor, { recursive: true, force: true });
mkdirSync(vendor, { recursive: true });

const { metafile } = await build({
  entryPoints: ["zarr.js"],
  outfile: `${vendor}zarr.js`,
  bundle: true,
  minify: true,
  format: "esm",
  target: "es2022",
  legalComments: "none",
  metafile: true,
  alias: Object.fromEntries(
    ["blosc", "lz4", "zstd"].map((codec) => [`numcodecs/${codec}`, "./no_codec.js"]),
  ),
});
copyFileSync(
  "node_modules/openseadragon/build/openseadragon/openseadragon.min.js",
  `${vendor}openseadragon.min.js`,
);

// The licence of every package of which there is something in the bundle.
const inputs = Object.keys(metafile.inputs).filter((path) => path.includes("node_modules/"));
const names = inputs.map((path) => path.match(/node_modules\/((?:@[^/]+\/)?[^/]+)/)[1]);
const licences = [...new Set([...names, "openseadragon"])].sort().map((name) => {
  const { version, license, repository } = JSON.parse(readFileSync(`node_modules/${name}/package.json`));
  const where = repository?.url ?? repository ?? "";
  return `${name} ${version} (${license}) ${where}\n\n${licenceOf(name)}`;
});
writeFileSync(`${vendor}LICENSES.txt`, licences.join(`\n${"-".repeat(80)}\n\n`));

function licenceOf(name) {
  const file = readdirSync(`node_modules/${name}`).find((file) => /^LICEN[CS]E/i.test(file));
  if (!file) throw new Error(`${name} has no licence file: do not ship it`);
  return readFileSync(`node_modules/${name}/${file}`, "utf8").trim() + "\n";
}
