// The protocol of a step without a network: messages in, messages out.
import assert from 'node:assert/strict';
import { test } from 'node:test';
import { Computer } from '../compute.js';
import { LinkError } from '../errors.js';
import { Leaf } from '../leaf.js';
import { bytesOf, crc32c, manifestDigest, versionDigest } from '../wire.js';

const tensors = [{ name: 'w', shape: [40], offset: 0, dtype: 'float32' }]; // 48 elements: 3 chunks of 16
const digest = manifestDigest(tensors);
const config = {
    runId: 'r',
    tensors,
    manifestDigest: digest,
    size: 48,
    chunkElements: 16,
    chunkCount: 3,
    window: 2,
    seed: 1n,
    trainSize: 100,
    testSize: 20,
    batchSize: 16,
    microbatches: 8,
    evaluationMicrobatches: 4,
    gradientDtype: 'float32',
    weightsDtype: 'float32',
    skipsNonfinite: false,
    taskFingerprint: 't',
    dataFingerprint: 'd',
};
/** A task whose gradient is 1 at sample % 40, per sample. */
const task = {
    gradient(_, samples, out) {
        out.fill(0);
        for (const sample of samples) out[sample % 40] += 1;
        return { loss: samples.length, count: samples.length, metrics: { accuracy: 1 } };
    },
    evaluate: (_, samples) => ({ loss: 2, count: samples.length, metrics: { accuracy: 1 } }),
};
const block = (lo, hi) => ({ lo, hi });
const tag = (step, kind = 'WORK_KIND_TRAIN') => ({
    run_id: 'r',
    term: '1',
    step: String(step),
    kind,
    weights_version: String(step),
});

function made(options = {}, work = task) {
    let now = 100;
    const all = { ...config, ...options },
        leaf = new Leaf(all, { id: 's-1', incarnation: '7' }, () => now);
    const computer = new Computer(all, work),
        flat = Float32Array.from({ length: 48 }, (_, i) => i % 5);
    const chunk = (index) => {
        const data = bytesOf(flat.subarray(16 * index, 16 * (index + 1)));
        return { index, offset_bytes: String(64 * index), data, crc32c: crc32c(data) };
    };
    const version = versionDigest(
        digest,
        Uint32Array.from([0, 1, 2], (i) => chunk(i).crc32c),
    );
    const header = (from = 0, held = false) => ({
        manifest_digest: digest,
        held_digest: held ? version : Buffer.alloc(0),
        from_chunk: from,
    });
    const says = (step, message) => leaf.onResponse({ tag: tag(step), ...message });
    return {
        leaf,
        says,
        chunk,
        header,
        version,
        start(step, blocks) {
            says(step, { weights_header: header(), assign: blocks && { attempt: 0, from_chunk: 0, blocks } });
            for (const index of [0, 1, 2]) says(step, { weights_chunk: chunk(index) });
            says(step, { weights_footer: { digest: version } });
        },
        compute() {
            for (let unit; (unit = leaf.nextUnit());) leaf.computed(computer.unit(leaf.weights.flat, unit));
        },
        sent() {
            const frames = [];
            for (let frame; (frame = leaf.nextUp());) frames.push(frame);
            return frames;
        },
        wait: (seconds) => (now += seconds),
    };
}
const places = (frames) => frames.map(({ gradient_chunk: c }) => [c.block.lo, c.block.hi, c.index]);

test('chunk by chunk across blocks, within credit', () => {
    const { leaf, start, compute, sent, says } = made();
    leaf.relinked();
    start(0, [block(0, 2), block(4, 8)]);
    assert.deepEqual(sent(), []); // nothing is computed
    compute();
    const first = sent();
    assert.deepEqual(places(first), [
        [0, 2, 0],
        [4, 8, 0],
        [0, 2, 1],
        [4, 8, 1],
    ]);
    assert.ok(first[0].gradient_header && first[1].gradient_header && !first[2].gradient_header);
    says(0, { credit: { attempt: 1, through_chunk: 2 } });
    assert.deepEqual(sent(), []); // another attempt's
    says(0, { credit: { attempt: 0, through_chunk: 2 } });
    const last = sent();
    assert.deepEqual(places(last), [
        [0, 2, 2],
        [4, 8, 2],
    ]);
    assert.deepEqual(
        last.map(({ gradient_footer: f }) => f.phases.length > 0),
        [false, true],
    );
    assert.ok(leaf.finished && !leaf.mayLeave);
    start(1, []);
    assert.ok(leaf.mayLeave);
});

test('a new attempt keeps what is computed, and sends a block in parts or as the sum of its parts', () => {
    const { leaf, start, compute, sent, says } = made();
    start(0, [block(0, 2), block(2, 4)]);
    compute();
    says(0, { begin: { attempt: 3, from_chunk: 1 } });
    const [{ ready, attempt, gradient_chunk: none }] = sent();
    assert.deepEqual([attempt, ready, none], [3, { held: [block(0, 4)], computing: [], idle: true }, undefined]);
    says(0, { assign: { attempt: 2, from_chunk: 1, blocks: [block(0, 8)] } });
    assert.equal(leaf.assigned, false); // of an attempt that is over
    says(0, { assign: { attempt: 3, from_chunk: 1, blocks: [block(0, 4), block(6, 7)] } });
    assert.deepEqual(leaf.queue, [block(6, 7)]);
    compute();
    const frames = sent();
    assert.deepEqual(places(frames), [
        [0, 4, 1],
        [6, 7, 1],
        [0, 4, 2],
        [6, 7, 2],
    ]);
    assert.deepEqual(
        frames[2].gradient_footer.contributions.map((c) => c.block),
        [block(0, 2), block(2, 4)],
    );
    const [left, right] = [...leaf.cache.values()].map(({ array }) => array.subarray(16, 32));
    assert.deepEqual(frames[0].gradient_chunk.data, bytesOf(left.map((value, i) => value + right[i])));
    assert.equal(frames[0].gradient_header.samples_count, 8);
});

test('a block in compute is told of, goes on, and is not computed twice', () => {
    const { leaf, start, sent, says } = made();
    start(0, [block(0, 4)]);
    leaf.nextUnit();
    says(0, { begin: { attempt: 1, from_chunk: 0 } });
    assert.deepEqual(sent()[0].ready, { held: [], computing: [block(0, 4)], idle: false });
    says(0, { assign: { attempt: 1, from_chunk: 0, blocks: [block(0, 8)] } });
    assert.deepEqual(leaf.queue, [block(4, 8)]);
    assert.deepEqual(leaf.hello({ id: 'p', incarnation: '1' }, {}).hello.held, [block(0, 4)]);
});

test('tags: an older one is dropped, a newer one without header ends the link, a header drops the step', () => {
    const { leaf, start, compute, says } = made();
    start(3, [block(0, 8)]);
    compute();
    says(2, { assign: { attempt: 0, from_chunk: 0, blocks: [block(0, 1)] } });
    assert.deepEqual([leaf.counts.stale, leaf.owed.length], [1, 1]);
    assert.throws(() => says(4, { credit: { attempt: 0, through_chunk: 2 } }), LinkError);
    assert.throws(() => leaf.onResponse({ tag: { ...tag(3), run_id: 'other' } }), LinkError);
    start(4, undefined);
    assert.deepEqual([leaf.cache.size, leaf.owed.length, leaf.assigned], [0, 0, false]); // a spare
});

test('weights go on where they were interrupted, and are not used before the footer', () => {
    const { leaf, says, chunk, header, version, compute } = made();
    says(0, { weights_header: header(), assign: { attempt: 0, from_chunk: 0, blocks: [block(0, 1)] } });
    says(0, { weights_chunk: chunk(0) });
    says(0, { weights_chunk: chunk(1) });
    assert.equal(leaf.nextUnit(), null);
    assert.throws(() => says(0, { weights_chunk: chunk(1) }), LinkError);
    const { hello } = leaf.hello({ id: 'p', incarnation: '1' }, {});
    assert.deepEqual([hello.holds_weights, hello.weights_chunks_held, hello.weights_term], [false, 2, 1]);
    leaf.relinked();
    assert.throws(() => says(0, { weights_header: header(1) }), LinkError);
    says(0, { weights_header: header(2), assign: { attempt: 0, from_chunk: 0, blocks: [block(0, 1)] } });
    assert.throws(() => says(0, { weights_chunk: { ...chunk(2), crc32c: 1 } }), LinkError);
    says(0, { weights_chunk: chunk(2), weights_footer: { digest: version } });
    compute();
    assert.equal(leaf.cache.size, 1);
    says(0, { weights_header: header(0, true) }); // held
    assert.ok(leaf.weights.complete);
    assert.throws(() => says(0, { weights_header: { ...header(0, true), held_digest: Buffer.alloc(16) } }), LinkError);
});

test('an evaluation is one frame per block; a block without samples is absent', () => {
    const { leaf, start, compute, sent, header, version } = made({ batchSize: 2 });
    start(0, [block(0, 1), block(1, 4)].slice(0, 1).concat(block(4, 8)));
    compute();
    const frames = sent(); // 2 samples in 8 microbatches: in the 4th and in the last
    assert.deepEqual(
        frames.filter((f) => f.gradient_header?.absent).map((f) => [f.gradient_header.block, 'gradient_chunk' in f]),
        [[block(0, 1), false]],
    );
    leaf.onResponse({
        tag: tag(1, 'WORK_KIND_EVALUATE'),
        weights_header: header(),
        assign: { attempt: 0, from_chunk: 0, blocks: [block(0, 4)] },
    });
    const again = made();
    again.start(0, undefined);
    again.leaf.onResponse({
        tag: { ...tag(1, 'WORK_KIND_EVALUATE'), weights_version: '0' },
        weights_header: { ...header(0, true), held_digest: version },
        assign: { attempt: 0, from_chunk: 0, blocks: [block(0, 4)] },
    });
    again.compute();
    const [frame, ...none] = again.sent();
    assert.deepEqual(
        [frame.gradient_header.loss_sum, frame.gradient_chunk.data.length, frame.gradient_footer.block, none],
        [8, 0, block(0, 4), []],
    );
});

test('what is not finite is left out where the run says so, else it is a failure', () => {
    const bad = { ...task, gradient: (w, samples, out) => ({ ...task.gradient(w, samples, out), loss: NaN }) };
    const skips = made({ skipsNonfinite: true }, bad);
    skips.start(0, [block(0, 2)]);
    skips.compute();
    const [{ gradient_header: header }] = skips.sent();
    assert.deepEqual(
        [header.absent, header.skipped.map((s) => [s.microbatch, s.tensors, s.sphere_id])],
        [
            true,
            [
                [0, ['(loss)'], 's-1'],
                [1, ['(loss)'], 's-1'],
            ],
        ],
    );
    const { leaf, start, compute, sent, wait } = made({}, bad);
    start(0, [block(0, 2)]);
    compute();
    const [{ task_failure: failure }, { capacity }] = sent();
    assert.deepEqual(
        [failure.microbatch, failure.invalid_gradient, failure.failures_count, capacity],
        [0, true, 1, { capacity: 0 }],
    );
    assert.ok(leaf.stuck);
    leaf.relinked();
    assert.equal(sent()[0].task_failure, failure); // told again on the next link
    wait(3);
    leaf.rested();
    assert.deepEqual(
        sent().map((m) => m.capacity),
        [{ capacity: 1 }],
    );
});
