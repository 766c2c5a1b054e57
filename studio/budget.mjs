// What the built page may weigh, and that it asks nobody: `node studio/budget.mjs`, after the build.
import { readFileSync, readdirSync } from 'node:fs';
import { fileURLToPath } from 'node:url';
import { gzipSync } from 'node:zlib';

const MOST_BYTES = 300 * 1024; // of script, compressed
const page = fileURLToPath(new URL('../twofold/studio/page/', import.meta.url));
const names = ['index.html', ...readdirSync(`${page}assets`).map((name) => `assets/${name}`)];
const compressed = (name) => gzipSync(readFileSync(page + name), { level: 9 }).length;
const script = names.filter((name) => name.endsWith('.js'));
const total = script.reduce((sum, name) => sum + compressed(name), 0);

// Names, not addresses: what marks SVG and MathML, and the pages that Svelte's and uPlot's messages and licences mention.
const NAMES = /^https?:\/\/(www\.w3\.org\/|svelte\.dev\/e\/|github\.com\/leeoniya\/uPlot|arxiv\.org\/abs\/)/;
const outside = names.flatMap((name) =>
  [...readFileSync(page + name, 'utf8').matchAll(/(?:https?|wss?):\/\/[\w.-]+[^\s"'`)<\\]*/g)]
    .map((found) => found[0])
    .filter((url) => !NAMES.test(url) && !/^https?:\/\/(localhost|127\.0\.0\.1)/.test(url))
    .map((url) => `${name}: ${url}`),
);

console.log(`${script.length} scripts, ${(total / 1024).toFixed(1)} KB compressed of ${MOST_BYTES / 1024} KB allowed`);
if (total > MOST_BYTES) throw new Error('the scripts are over their budget');
if (outside.length) throw new Error(`the page names other machines: ${outside.join(', ')}`);
