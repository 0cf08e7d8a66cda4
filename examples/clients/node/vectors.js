/**
 * `worker.js --vectors DIR`: everything in protos/testdata, decoded or computed anew.
 *
 * Of randomness.json `digits` needs nothing, since its gradient draws no random number; a task with dropout would, so
 * it is computed too. What a worker never does, the mean and most of control's messages, is checked all the same.
 */
import { createHash } from 'node:crypto';
import { readFileSync, readdirSync } from 'node:fs';
import { join } from 'node:path';
import { UsageError } from './errors.js';
import { loadProtos } from './link.js';
import { Order, Sampler, mix, randomWords } from './shuffle.js';
import * as wire from './wire.js';

/** @typedef {(what: string, got: unknown, wanted: unknown) => void} Expect */

const hex = (/** @type {Uint8Array} */ bytes) => Buffer.from(bytes).toString('hex');
const bytes = (/** @type {string} */ text) => Buffer.from(text, 'hex');
const word = (/** @type {bigint} */ value) => value.toString(16).padStart(16, '0');
const crc = (/** @type {Uint8Array} */ data) => wire.crc32c(data).toString(16).padStart(8, '0');

/** @param {string} text little-endian float32 as hexadecimal */
function floats(text) {
    const out = new Float32Array(text.length / 8);
    wire.fromWire(bytes(text), 'float32', out);
    return out;
}

/** The canonical sum of leaves, of which null ones are absent.
 * @param {(string | null)[]} leaves @param {wire.Dtype} dtype @param {wire.Block} block
 * @returns {Float32Array | null} */
function sum(leaves, dtype, block = { lo: 0, hi: leaves.length }) {
    if (block.hi - block.lo === 1) {
        const leaf = leaves[block.lo];
        if (leaf === null) return null;
        const out = floats(leaf);
        wire.roundInPlace(out, dtype);
        return out;
    }
    const [left, right] = wire.halves(block).map((half) => sum(leaves, dtype, half));
    if (!left || !right) return left ?? right;
    wire.addRounded(left, right, left, dtype);
    return left;
}

/** @param {(string | null)[]} leaves @param {wire.Dtype} dtype */
const hexSum = (leaves, dtype) => hex(wire.bytesOf(sum(leaves, dtype) ?? new Float32Array()));

/** Every message by its name, decoded; the same bytes must come out again.
 * @param {{name: string, message: string, bytes: string}[]} frames @param {Expect} expect */
function decodedFrames(frames, expect) {
    const codecs = /** @type {Record<string, [Function, Function]>} */ ({});
    for (const [service, methods] of Object.entries(loadProtos(false))) {
        if (!service.endsWith('Service')) continue;
        for (const method of Object.values(/** @type {any} */ (methods))) {
            codecs[method.requestType.type.name] = [method.requestDeserialize, method.requestSerialize];
            codecs[method.responseType.type.name] = [method.responseDeserialize, method.responseSerialize];
        }
    }
    const found = /** @type {Record<string, any>} */ ({});
    for (const { name, message, bytes: text } of frames) {
        const [decode, encode] = codecs[message.replace('spheres.v1.', '')];
        found[name] = decode(bytes(text));
        expect(`${name}, encoded again`, hex(encode(found[name])), text);
    }
    return found;
}

/** What was decoded as protobuf writes it as JSON: bytes in base64; a timestamp or a duration where `like` is a text.
 * @param {any} own @param {any} like @returns {any} */
function asJson(own, like) {
    if (Buffer.isBuffer(own)) return own.toString('base64');
    if (Array.isArray(own)) return own.map((item, i) => asJson(item, like?.[i]));
    if (own === null || typeof own !== 'object') return own;
    if (typeof like === 'string') {
        const { seconds = '0', nanos = 0 } = own,
            milliseconds = 1e3 * Number(seconds) + nanos / 1e6;
        const decimals = nanos ? 3 : 0; // of these vectors
        if (like.endsWith('s')) return `${(milliseconds / 1e3).toFixed(decimals)}s`;
        return new Date(milliseconds).toISOString().replace(decimals ? '' : '.000', '');
    }
    return Object.fromEntries(Object.entries(own).map(([name, value]) => [name, asJson(value, like?.[name])]));
}

/** @type {Record<string, (vectors: any, expect: Expect) => void>} */
const CHECKS = {
    'control.json'({ frames }, expect) {
        const found = decodedFrames(frames, expect);
        for (const { name, value } of frames) expect(name, asJson(found[name], value), value);
    },

    'digests.json'({ crc32c, manifests, versions }, expect) {
        for (const { text, crc32c: wanted } of crc32c) expect(`CRC-32C of '${text}'`, crc(Buffer.from(text)), wanted);
        const known = /** @type {Map<string, any[]>} */ (new Map());
        for (const { tensors, elements, text, digest } of manifests) {
            known.set(digest, tensors);
            expect(`size of ${text}`, wire.flatSize(tensors), elements);
            expect('text of a manifest', wire.manifestText(tensors), text);
            expect(`digest of ${text}`, hex(wire.manifestDigest(tensors)), digest);
        }
        for (const {
            manifest_digest: manifest,
            chunk_bytes: size,
            flat,
            checksums,
            digest,
            sha256_without_padding: sha,
        } of versions) {
            const data = bytes(flat),
                count = Math.ceil(data.length / size);
            const own = Uint32Array.from({ length: count }, (_, i) =>
                wire.crc32c(data.subarray(i * size, (i + 1) * size)),
            );
            expect(
                `checksums of chunks of ${digest}`,
                Array.from(own, (c) => c.toString(16).padStart(8, '0')),
                checksums,
            );
            expect(`digest of version ${digest}`, hex(wire.versionDigest(bytes(manifest), own)), digest);
            const packed = createHash('sha256');
            for (const tensor of known.get(manifest) ?? []) {
                packed.update(data.subarray(4 * tensor.offset, 4 * (tensor.offset + wire.elementsOf(tensor))));
            }
            expect(`weights_sha256 of ${digest}`, packed.digest('hex'), sha);
        }
    },

    'frames.json'({ frames }, expect) {
        const found = decodedFrames(frames, expect);
        const {
            hello: { hello },
            weights,
            gradient,
        } = found;
        expect('hello', [hello.sphere_id, hello.incarnation, hello.capacity], ['s-1', '1000000001', 1]);
        for (const { weights_chunk, gradient_chunk } of [weights, gradient]) {
            const chunk = weights_chunk ?? gradient_chunk;
            expect('checksum of a chunk', wire.crc32c(chunk.data), chunk.crc32c);
        }
        const own = wire.versionDigest(
            weights.weights_header.manifest_digest,
            Uint32Array.of(weights.weights_chunk.crc32c),
        );
        expect('digest in the footer', hex(own), hex(weights.weights_footer.digest));
        expect('digest in the gradient', hex(gradient.gradient_header.weights_digest), hex(own));
        expect('checksum by reference', found.weights_reference.weights_reference.crc32c, [
            weights.weights_chunk.crc32c,
        ]);
    },

    'randomness.json'({ first_words: microbatches }, expect) {
        for (const { seed, step, index, words } of microbatches) {
            const own = randomWords(BigInt(seed), BigInt(step), BigInt(index), words.length);
            expect(`words of seed ${seed}, step ${step}, microbatch ${index}`, own.map(word), words);
        }
    },

    'rounding.json'({ bfloat16, sums }, expect) {
        const isNaN = (/** @type {string} */ text) => Number.isNaN(floats(text)[0]);
        for (const { value, rounded, wire: onWire } of bfloat16) {
            const array = floats(value),
                back = new Float32Array(1);
            wire.roundInPlace(array, 'bfloat16');
            const data = wire.toWire(array, 'bfloat16');
            wire.fromWire(data, 'bfloat16', back);
            if (isNaN(rounded)) {
                expect(`a NaN ${value}`, [array[0], back[0]], [NaN, NaN]); // which one is not said
            } else {
                expect(
                    `${value} rounded`,
                    [hex(wire.bytesOf(array)), hex(data), hex(wire.bytesOf(back))],
                    [rounded, onWire, rounded],
                );
            }
        }
        for (const { leaves, sum: wanted } of sums) expect(`sum ${wanted}`, hexSum(leaves, 'bfloat16'), wanted);
    },

    'shuffle.json'({ mix64, shuffles, microbatches }, expect) {
        for (const { word: text, mixed } of mix64) expect(`mix(${text})`, word(mix(BigInt(`0x${text}`))), mixed);
        for (const { seed, epoch, size, positions, samples } of shuffles) {
            const order = new Order(BigInt(seed), BigInt(epoch), BigInt(size));
            expect(
                `seed ${seed}, epoch ${epoch}, size ${size}`,
                positions.map((/** @type {number} */ p) => Number(order.at(BigInt(p)))),
                samples,
            );
        }
        for (const { seed, size, batch_size: batchSize, microbatches: parts, step, index, samples } of microbatches) {
            const sampler = new Sampler({ seed: BigInt(seed), size, batchSize, microbatches: parts });
            expect(`seed ${seed}, step ${step}, microbatch ${index}`, sampler.microbatch(step, index), samples);
        }
    },

    'sums.json'({ decompositions, sums, means }, expect) {
        for (const {
            microbatches,
            range: [lo, hi],
            blocks,
        } of decompositions) {
            const own = wire.decompose(wire.indicesOf([{ lo, hi }]), { lo: 0, hi: microbatches });
            expect(
                `[${lo},${hi}) of ${microbatches}`,
                own.map((block) => [block.lo, block.hi]),
                blocks,
            );
            expect(
                'canonical',
                own.every((block) => wire.isCanonical(block, microbatches)),
                true,
            );
        }
        for (const { leaves, sum: wanted } of sums) expect(`sum ${wanted}`, hexSum(leaves, 'float32'), wanted);
        for (const { sum: total, count, mean } of means) {
            const own = floats(total).map((value) => value * Math.fround(1 / count));
            expect(`mean of ${total} over ${count}`, hex(wire.bytesOf(own)), mean);
        }
    },
};

/** Check every file of a directory, a line for each; true where all is well. @param {string} directory */
export function checkVectors(directory) {
    let good = true,
        names;
    try {
        names = readdirSync(directory).sort();
    } catch {
        throw new UsageError(`--vectors ${directory}: no such directory; give protos/testdata of the source tree`);
    }
    for (const name of new Set([...Object.keys(CHECKS), ...names])) {
        const wrong = /** @type {string[]} */ ([]);
        let count = 0;
        try {
            if (!(name in CHECKS)) throw new Error('this worker does not know what is in it');
            CHECKS[name](JSON.parse(readFileSync(join(directory, name), 'utf8')), (what, got, wanted) => {
                count++;
                const [own, golden] = [got, wanted].map((value) => JSON.stringify(value));
                if (own !== golden) wrong.push(`${what}: ${own}, not ${golden}`);
            });
        } catch (error) {
            wrong.push(String(error));
        }
        process.stdout.write(`${name}: ${wrong.length ? `WRONG: ${wrong.join('; ')}` : `${count} checks passed`}\n`);
        good &&= !wrong.length;
    }
    return good;
}
