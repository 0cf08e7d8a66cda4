/**
 * Computes blocks on a thread of its own, so that no microbatch, however long it takes, holds up a sign of life.
 *
 * Weights lie in memory that both threads see. They are overwritten while a block is computed only where its step is
 * over: then the main thread drops the result, and this one stops after the microbatch in hand.
 */
import { Worker, isMainThread, parentPort, workerData } from 'node:worker_threads';
import { Digits } from './digits.js';
import { Sampler, slice } from './shuffle.js';
import { addRounded, addSums, bytesOf, crc32c, elementsOf, halves, roundInPlace } from './wire.js';

/** @typedef {import('./wire.js').Block} Block */
/** @typedef {import('./wire.js').Sums} Sums */
/** @typedef {import('./config.js').Config} Config */
/** A microbatch that is not finite and was left out.
 * @typedef {{microbatch: number, tensors: string[], sample_ids: number[]}} Skipped */
/** A block that was computed; array and sums are null where no microbatch of it has a gradient.
 * @typedef {{block: Block, array: Float32Array | null, sums: Sums | null, skipped: Skipped[], crc32c: number}} Held */
/** What the task raised, as a TaskFailure has it.
 * @typedef {{microbatch: number, error: string, traceback: string, sample_ids: number[],
 *   invalid_gradient: boolean}} Failure */
/** @typedef {{number: number, block: Block, step: number, train: boolean}} Unit */
/** @typedef {{unit: Unit, held?: Held, failure?: Failure, seconds: number, microbatches: number,
 *   samples: number}} Result */

const MOST_TENSORS = 16,
    MOST_SAMPLES = 64;

/** A gradient, or sums, that are not finite. */
class NotFinite extends Error {}

/** The pure part: blocks from weights. Mutable state: buffers that are free. */
export class Computer {
    /** @type {Float32Array[]} */
    #free = [];

    /** @param {Config} config @param {Digits} task */
    constructor(config, task) {
        this.config = config;
        this.task = task;
        const { seed, trainSize: size, batchSize, microbatches } = config;
        this.sampler = new Sampler({ seed, size, batchSize, microbatches });
    }

    /** Compute a unit; null where it was cancelled. @param {Float32Array} weights @param {Unit} unit
     * @param {() => boolean} cancelled @returns {Result | null} */
    unit(weights, unit, cancelled = () => false) {
        const started = performance.now();
        const result = { unit, seconds: 0, microbatches: 0, samples: 0 };
        let index = unit.block.lo;
        /** Depth first and left before right: few buffers at a time. @returns {Held | null} @param {Block} block */
        const compute = (block) => {
            if (cancelled()) return null;
            if (block.hi - block.lo > 1) {
                const [left, right] = halves(block).map(compute);
                return left && right && this.#add(block, left, right);
            }
            index = block.lo;
            const samples = this.#samples(unit, index);
            const held = this.#microbatch(weights, unit, index, samples);
            if (unit.train && samples.length) {
                result.microbatches++;
                result.samples += samples.length;
            }
            return held;
        };
        try {
            const held = compute(unit.block);
            if (!held) return null;
            if (held.array) held.crc32c = crc32c(bytesOf(held.array));
            return { ...result, held, seconds: (performance.now() - started) / 1000 };
        } catch (error) {
            const { name, message, stack } = /** @type {Error} */ (error),
                invalid = error instanceof NotFinite;
            const failure = {
                microbatch: index,
                error: invalid ? message : `${name}: ${message}`,
                traceback: String(stack).slice(-65_536),
                sample_ids: unit.train ? this.#samples(unit, index).slice(0, MOST_SAMPLES) : [],
                invalid_gradient: invalid,
            };
            return { ...result, failure, seconds: (performance.now() - started) / 1000 };
        }
    }

    /** @param {Unit} unit @param {number} index */
    #samples(unit, index) {
        if (unit.train) return this.sampler.microbatch(unit.step, index);
        const [lo, hi] = slice(this.config.testSize, this.config.evaluationMicrobatches, index);
        return Array.from({ length: hi - lo }, (_, i) => lo + i);
    }

    /** @param {Float32Array} weights @param {Unit} unit @param {number} index @param {number[]} samples
     * @returns {Held} */
    #microbatch(weights, unit, index, samples) {
        const held = { block: { lo: index, hi: index + 1 }, array: null, sums: null, skipped: [], crc32c: 0 };
        if (!samples.length) return held;
        if (!unit.train) {
            const sums = this.task.evaluate(weights, samples),
                wrong = notFinite(sums);
            if (wrong.length) throw new NotFinite(`evaluate() returned sums that are not finite: ${wrong.join(', ')}`);
            return { ...held, sums };
        }
        const { gradientDtype, tensors, skipsNonfinite, size } = this.config;
        const array = this.#free.pop() ?? new Float32Array(size);
        const sums = this.task.gradient(weights, samples, array);
        roundInPlace(array, gradientDtype); // infinity after rounding is not finite (N16, N21)
        const finite = (/** @type {Config['tensors'][0]} */ tensor) =>
            array.subarray(tensor.offset, tensor.offset + elementsOf(tensor)).every(Number.isFinite);
        const names = tensors.filter((tensor) => !finite(tensor)).map((tensor) => tensor.name);
        const wrong = [...notFinite(sums), ...names].slice(0, MOST_TENSORS);
        if (!wrong.length) return { ...held, array, sums };
        this.#free.push(array);
        if (!skipsNonfinite) throw new NotFinite(`the gradient has what is not finite in ${wrong.join(', ')}`);
        const verdict = { microbatch: index, tensors: wrong, sample_ids: samples.slice(0, MOST_SAMPLES) };
        return { ...held, skipped: [verdict] };
    }

    /** @param {Block} block @param {Held} left @param {Held} right @returns {Held} */
    #add(block, left, right) {
        const skipped = [...left.skipped, ...right.skipped],
            sums = addSums(left.sums, right.sums);
        let array = left.array ?? right.array;
        if (left.array && right.array) {
            array = left.array;
            addRounded(left.array, right.array, array, this.config.gradientDtype);
            this.#free.push(right.array);
        }
        return { block, array, sums, skipped, crc32c: 0 };
    }
}

/** Names, in a verdict, of sums that are not finite. @param {Sums} sums */
const notFinite = ({ loss, metrics }) => [
    ...(Number.isFinite(loss) ? [] : ['(loss)']),
    ...Object.keys(metrics)
        .filter((name) => !Number.isFinite(metrics[name]))
        .map((name) => `(metric ${name})`),
];

/** The thread, as the main one sees it. Mutable state: the number of the unit that is wanted; both threads see it. */
export class ComputeThread {
    /** @param {Config} config @param {string} file the data @param {Float32Array} weights in shared memory
     * @param {(result: Result | null) => void} done null where the unit was cancelled
     * @param {(error: Error) => void} broken */
    constructor(config, file, weights, done, broken) {
        this.wanted = new Int32Array(new SharedArrayBuffer(4));
        this.thread = new Worker(new URL(import.meta.url), {
            workerData: { config, file, weights, wanted: this.wanted },
        });
        this.thread.on('message', done).on('error', broken);
    }

    /** @param {Unit} unit */
    submit(unit) {
        Atomics.store(this.wanted, 0, unit.number);
        this.thread.postMessage(unit);
    }

    cancel() {
        Atomics.store(this.wanted, 0, 0);
    }

    close() {
        this.cancel();
        return this.thread.terminate();
    }
}

if (!isMainThread && workerData?.wanted) {
    const { config, file, weights, wanted } = workerData;
    const computer = new Computer(config, new Digits(file, config.taskOptions, config.tensors));
    parentPort?.on('message', (/** @type {Unit} */ unit) => {
        const result = computer.unit(weights, unit, () => Number(Atomics.load(wanted, 0)) !== unit.number);
        const buffer = result?.held?.array?.buffer;
        parentPort?.postMessage(result, buffer ? [/** @type {ArrayBuffer} */ (buffer)] : []);
    });
}
