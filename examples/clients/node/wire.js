/**
 * Bytes and sums, to the bit: CRC-32C, digests, types on the wire, canonical blocks. Pure.
 *
 * The recipes are those of docs/protocol.md (Digests, Canonical sums, Types on the wire). A float32 sum is a double sum
 * that is stored into a Float32Array: for one addition that rounds to the very same bits.
 */
import { createHash } from 'node:crypto';
import { endianness } from 'node:os';

if (endianness() !== 'LE')
    throw new Error('this worker reads float32 where they lie: it needs a little-endian machine');

/** @typedef {{lo: number, hi: number}} Block microbatches lo to hi - 1 */
/** @typedef {'float32' | 'bfloat16'} Dtype */
/** @typedef {{name: string, shape: (string|number)[], offset: string|number, dtype: string}} Tensor */

// ---- CRC-32C

/** Eight tables of 256 words, so that eight bytes are taken at a time. */
const TABLES = new Uint32Array(8 * 256);
for (let byte = 0; byte < 256; byte++) {
    let word = byte;
    for (let bit = 0; bit < 8; bit++) word = word & 1 ? (word >>> 1) ^ 0x82f63b78 : word >>> 1;
    TABLES[byte] = word;
}
for (let i = 256; i < TABLES.length; i++) TABLES[i] = (TABLES[i - 256] >>> 8) ^ TABLES[TABLES[i - 256] & 255];

/**
 * @param {Uint8Array} data
 * @param {number} before the checksum of what came before, to go on from
 */
export function crc32c(data, before = 0) {
    const t = TABLES;
    let crc = ~before,
        i = 0;
    for (const end = data.length - 7; i < end; i += 8) {
        const low = crc ^ (data[i] | (data[i + 1] << 8) | (data[i + 2] << 16) | (data[i + 3] << 24));
        crc =
            t[1792 + (low & 255)] ^
            t[1536 + ((low >>> 8) & 255)] ^
            t[1280 + ((low >>> 16) & 255)] ^
            t[1024 + (low >>> 24)] ^
            t[768 + data[i + 4]] ^
            t[512 + data[i + 5]] ^
            t[256 + data[i + 6]] ^
            t[data[i + 7]];
    }
    for (; i < data.length; i++) crc = (crc >>> 8) ^ t[(crc ^ data[i]) & 255];
    return ~crc >>> 0;
}

// ---- digests and the flat buffer

/** @param {Tensor} tensor */
export const elementsOf = (tensor) => tensor.shape.reduce((/** @type {number} */ n, width) => n * Number(width), 1);

/** Elements of the flat buffer, padding included. @param {Tensor[]} tensors */
export const flatSize = (tensors) =>
    Math.max(0, ...tensors.map((tensor) => Math.ceil((Number(tensor.offset) + elementsOf(tensor)) / 16) * 16));

/** The text that a manifest's digest is taken of: ASCII, without a space. @param {Tensor[]} tensors */
export function manifestText(tensors) {
    const escaped = (/** @type {string} */ name) =>
        JSON.stringify(name).replace(/[\u007f-\uffff]/g, (c) => `\\u${c.charCodeAt(0).toString(16).padStart(4, '0')}`);
    const entries = tensors.map((t) => `[${escaped(t.name)},[${t.shape.join(',')}],${t.offset},"${t.dtype}"]`);
    return `[${entries.join(',')}]`;
}

const first16 = (/** @type {import('node:crypto').Hash} */ hash) => hash.digest().subarray(0, 16);

/** @param {Tensor[]} tensors */
export const manifestDigest = (tensors) => first16(createHash('sha256').update(manifestText(tensors), 'ascii'));

/** Digest of a version of the weights. @param {Uint8Array} manifest @param {Uint32Array} checksums of its chunks */
export const versionDigest = (manifest, checksums) =>
    first16(createHash('sha256').update(manifest).update(bytesOf(checksums)));

/** The memory of a typed array, as it stands. @param {Float32Array | Uint16Array | Uint32Array} array */
export const bytesOf = (array) => Buffer.from(array.buffer, array.byteOffset, array.byteLength);

// ---- types on the wire

/** @param {Dtype} dtype */
export const itemSize = (dtype) => (dtype === 'bfloat16' ? 2 : 4);

/** A float32's word, rounded to the nearest bfloat16, of two equally near to the even one. A NaN stays one. */
const rounded = (/** @type {number} */ word) =>
    (word & 0x7fffffff) > 0x7f800000 ? word | 0x00400000 : word + 0x7fff + ((word >>> 16) & 1);

const wordsOf = (/** @type {Float32Array} */ array) => new Uint32Array(array.buffer, array.byteOffset, array.length);

/** Round each element to what the run's type can hold. @param {Float32Array} array @param {Dtype} dtype */
export function roundInPlace(array, dtype) {
    if (dtype !== 'bfloat16') return;
    const words = wordsOf(array);
    for (let i = 0; i < words.length; i++) words[i] = rounded(words[i]) & 0xffff0000;
}

/** The bytes of rounded elements on the wire; of float32 a view of them.
 * @param {Float32Array} array @param {Dtype} dtype */
export function toWire(array, dtype) {
    if (dtype !== 'bfloat16') return bytesOf(array);
    const words = wordsOf(array),
        out = new Uint16Array(array.length);
    for (let i = 0; i < out.length; i++) out[i] = words[i] >>> 16;
    return bytesOf(out);
}

/** @param {Uint8Array} data of out's length @param {Dtype} dtype @param {Float32Array} out */
export function fromWire(data, dtype, out) {
    if (dtype !== 'bfloat16') return void new Uint8Array(out.buffer, out.byteOffset, out.byteLength).set(data);
    const words = wordsOf(out);
    for (let i = 0; i < words.length; i++) words[i] = (data[2 * i] << 16) | (data[2 * i + 1] << 24);
}

/** left + right, rounded: one node of the canonical sum. `out` may be either of them.
 * @param {Float32Array} left @param {Float32Array} right @param {Float32Array} out @param {Dtype} dtype */
export function addRounded(left, right, out, dtype) {
    for (let i = 0; i < out.length; i++) out[i] = left[i] + right[i];
    roundInPlace(out, dtype);
}

// ---- canonical blocks

/** The two blocks whose sum, left + right, is this one of at least two microbatches. @param {Block} block */
export function halves({ lo, hi }) {
    const half = 2 ** Math.floor(Math.log2(hi - lo - 1));
    return [
        { lo, hi: lo + half },
        { lo: lo + half, hi },
    ];
}

/** Whether a block is a node of the tree over `total` microbatches. @param {Block} block @param {number} total */
export function isCanonical({ lo, hi }, total) {
    if (!(lo >= 0 && lo < hi && hi <= total)) return false;
    const width = 2 ** Math.ceil(Math.log2(hi - lo));
    return lo % width === 0 && hi === Math.min(lo + width, total);
}

/** @param {Block} outer @param {Block} inner */
export const contains = (outer, inner) => outer.lo <= inner.lo && inner.hi <= outer.hi;

/** The largest canonical blocks below `top` whose microbatches are all in `indices`, in order.
 * @param {Set<number>} indices @param {Block} top @returns {Block[]} */
export function decompose(indices, top) {
    let found = 0;
    for (let i = top.lo; i < top.hi; i++) if (indices.has(i)) found++;
    if (found === 0) return [];
    return found === top.hi - top.lo ? [top] : halves(top).flatMap((half) => decompose(indices, half));
}

/** Microbatches of some blocks. @param {Iterable<Block>} blocks */
export function indicesOf(blocks) {
    const indices = /** @type {Set<number>} */ (new Set());
    for (const { lo, hi } of blocks) for (let i = lo; i < hi; i++) indices.add(i);
    return indices;
}

/** Sums over samples: loss and metrics in float64. Either side may be null, absent: absent + x is x as it stands.
 * @typedef {{loss: number, count: number, metrics: Record<string, number>}} Sums
 * @param {Sums | null} left @param {Sums | null} right @returns {Sums | null} */
export function addSums(left, right) {
    if (!left || !right) return left ?? right;
    const metrics = { ...left.metrics };
    for (const [name, value] of Object.entries(right.metrics))
        metrics[name] = name in metrics ? metrics[name] + value : value;
    return { loss: left.loss + right.loss, count: left.count + right.count, metrics };
}
