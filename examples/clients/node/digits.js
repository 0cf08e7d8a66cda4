/**
 * The task `digits`: 8x8 handwritten digits and a perceptron, as spheres/tasks/digits.py and mlp.py have them.
 *
 * What is stored is float32, as there; sums run in float64, so the two agree to about 1e-6. A task of your own needs
 * the same four things: size, check, gradient (summed over samples, never the mean) and evaluate.
 */
import { readFileSync } from 'node:fs';
import { createHash } from 'node:crypto';
import { gunzipSync } from 'node:zlib';
import { TaskError } from './errors.js';
import { Order } from './shuffle.js';

/** @typedef {import('./wire.js').Sums} Sums */
/** @typedef {import('./wire.js').Tensor} Tensor */

const PIXELS = 64,
    CLASSES = 10,
    SAMPLES = 1797,
    TRAIN = 1437,
    BRIGHTEST = 16;

/** Layer widths from 64, "256,128" or "(256,128)"; none for an empty text. @param {string} text */
function widths(text) {
    const parts = text
        .replace(/^[()[\] ]+|[()[\] ]+$/g, '')
        .split(',')
        .map((part) => part.trim())
        .filter(Boolean);
    if (parts.some((part) => !/^\+?0*[1-9]\d*$/.test(part))) {
        throw new TaskError(`task option hidden='${text}': give layer widths such as 64 or 256,128`);
    }
    return parts.map(Number);
}

export class Digits {
    /** @param {string} file digits.csv.gz @param {Record<string, string>} options
     * @param {Tensor[]} tensors the manifest's */
    constructor(file, options, tensors) {
        const unknown = Object.keys(options).filter((name) => name !== 'hidden');
        if (unknown.length)
            throw new TaskError(`options of task digits: ${unknown.join(', ')} is not known; it takes hidden`);
        this.layers = [PIXELS, ...widths(options.hidden ?? '64'), CLASSES];
        this.places = this.#places(tensors);
        let packed;
        try {
            packed = readFileSync(file);
        } catch (error) {
            throw new TaskError(
                `cannot read the data: ${/** @type {Error} */ (error).message}; say where they are with --data`,
            );
        }
        /** What control has for the same data: 16 hex digits over the file's SHA-256 in hex. */
        const hex = createHash('sha256').update(packed).digest('hex');
        this.fingerprint = createHash('sha256').update(hex).digest('hex').slice(0, 16);
        const numbers = gunzipSync(packed).toString('ascii').trim().split(/[,\n]/).map(Number);
        if (numbers.length !== SAMPLES * (PIXELS + 1) || numbers.some(Number.isNaN))
            throw new TaskError(`${file} is not digits.csv.gz`);
        // the file is ordered by writer; the split is part of the task
        const order = new Order(0n, 0n, BigInt(SAMPLES));
        this.images = new Float32Array(SAMPLES * PIXELS);
        this.labels = new Uint8Array(SAMPLES);
        for (let i = 0; i < SAMPLES; i++) {
            const row = Number(order.at(BigInt(i))) * (PIXELS + 1);
            for (let p = 0; p < PIXELS; p++) this.images[i * PIXELS + p] = numbers[row + p] / BRIGHTEST;
            this.labels[i] = numbers[row + PIXELS];
        }
    }

    /** Where each layer's weight and bias lie in the flat buffer. Throws where the manifest is another model's.
     * @param {Tensor[]} tensors */
    #places(tensors) {
        const wanted = this.layers.slice(1).flatMap((width, n) => [
            { name: `layer${n}.weight`, shape: [this.layers[n], width] },
            { name: `layer${n}.bias`, shape: [width] },
        ]);
        const text = (/** @type {{name: string, shape: (string|number)[]}[]} */ list) =>
            list.map((t) => `${t.name}[${t.shape}]`).join(' ');
        if (text(wanted) !== text(tensors)) {
            throw new TaskError(`the run's model is ${text(tensors)}; this worker's digits has ${text(wanted)}`);
        }
        return this.layers
            .slice(1)
            .map((_, n) => ({ weight: Number(tensors[2 * n].offset), bias: Number(tensors[2 * n + 1].offset) }));
    }

    /** @param {'train' | 'test'} split */
    size(split) {
        return split === 'train' ? TRAIN : SAMPLES - TRAIN;
    }

    /** Write the gradient of the summed loss over the tensors of `out`; its gaps stay as they are.
     * @param {Float32Array} flat @param {number[]} samples @param {Float32Array} out @returns {Sums} */
    gradient(flat, samples, out) {
        const { layers, places } = this,
            { sums, activations, labels } = this.#forward(flat, samples);
        const rows = samples.length,
            last = layers.length - 1;
        // the softmax, less 1 at the label: #forward left exp(logits - max) there
        let delta = activations[last];
        for (let s = 0; s < rows; s++) {
            const row = delta.subarray(s * CLASSES, (s + 1) * CLASSES),
                total = Math.fround(row.reduce((a, b) => a + b, 0));
            for (let c = 0; c < CLASSES; c++) row[c] /= total;
            row[labels[s]] -= 1;
        }
        for (let n = last - 1; n >= 0; n--) {
            const inputs = activations[n],
                wide = layers[n],
                width = layers[n + 1];
            const sum = new Float64Array(width);
            for (let i = 0; i < wide; i++) {
                sum.fill(0);
                for (let s = 0; s < rows; s++) {
                    const input = inputs[s * wide + i],
                        base = s * width;
                    for (let o = 0; o < width; o++) sum[o] += input * delta[base + o];
                }
                out.set(sum, places[n].weight + i * width);
            }
            sum.fill(0);
            for (let s = 0; s < rows; s++) for (let o = 0; o < width; o++) sum[o] += delta[s * width + o];
            out.set(sum, places[n].bias);
            if (n === 0) break;
            const below = new Float32Array(rows * wide),
                weights = places[n].weight;
            for (let i = 0; i < wide; i++) {
                const w = weights + i * width;
                for (let s = 0; s < rows; s++) {
                    const d = s * width;
                    let dot = 0;
                    for (let o = 0; o < width; o++) dot += delta[d + o] * flat[w + o];
                    // a multiplication, as there: a delta that is not finite stays so where the unit is off
                    below[s * wide + i] = Math.fround(dot) * (inputs[s * wide + i] > 0 ? 1 : 0);
                }
            }
            delta = below;
        }
        return sums;
    }

    /** Sums over samples of the test split. @param {Float32Array} flat @param {number[]} samples */
    evaluate(flat, samples) {
        return this.#forward(
            flat,
            samples.map((sample) => TRAIN + sample),
        ).sums;
    }

    /** ReLU between layers, softmax cross-entropy; the last activations are exp(logits - largest).
     * @param {Float32Array} flat @param {number[]} samples */
    #forward(flat, samples) {
        const { layers, places } = this,
            rows = samples.length,
            last = layers.length - 1;
        const activations = layers.map((width) => new Float32Array(rows * width));
        samples.forEach((sample, s) =>
            activations[0].set(this.images.subarray(sample * PIXELS, (sample + 1) * PIXELS), s * PIXELS),
        );
        for (let n = 0; n < last; n++) {
            const wide = layers[n],
                width = layers[n + 1],
                below = activations[n],
                above = activations[n + 1];
            if (n) for (let i = 0; i < below.length; i++) if (below[i] < 0) below[i] = 0;
            const { weight, bias } = places[n],
                sums = new Float64Array(rows * width);
            // samples inside: large weights are read once, not once per sample
            for (let i = 0; i < wide; i++) {
                const w = weight + i * width;
                for (let s = 0; s < rows; s++) {
                    const input = below[s * wide + i],
                        base = s * width;
                    for (let o = 0; o < width; o++) sums[base + o] += input * flat[w + o];
                }
            }
            for (let i = 0; i < above.length; i++) above[i] = Math.fround(sums[i]) + flat[bias + (i % width)];
        }
        const labels = samples.map((sample) => this.labels[sample]),
            logits = activations[last];
        let loss = 0,
            correct = 0;
        for (let s = 0; s < rows; s++) {
            const row = logits.subarray(s * CLASSES, (s + 1) * CLASSES);
            const largest = row.reduce((a, b) => Math.max(a, b)); // NaN where one is: then the loss is NaN too
            const at = row.indexOf(largest),
                atLabel = Math.fround(row[labels[s]] - largest);
            let total = 0;
            for (let c = 0; c < CLASSES; c++) total += row[c] = Math.exp(Math.fround(row[c] - largest));
            loss += Math.fround(Math.log(Math.fround(total)) - atLabel);
            if (at === labels[s]) correct++;
        }
        return { sums: { loss, count: rows, metrics: { accuracy: correct } }, activations, labels };
    }
}
