// What a status means, and what is done about it: the table of docs/protocol.md.
import assert from 'node:assert/strict';
import { test } from 'node:test';
import { status } from '@grpc/grpc-js';
import { afterRefusal, fromStatus } from '../errors.js';

const after = (code, details, fromControl) => afterRefusal(fromStatus({ code, details }), fromControl);

test('refusals that no other attempt cures end the worker, where control says them', () => {
    const { FAILED_PRECONDITION, NOT_FOUND, ABORTED, INVALID_ARGUMENT, UNAVAILABLE } = status;
    assert.equal(after(FAILED_PRECONDITION, 'VersionMismatchError: s-1 speaks 2', true), 'end');
    assert.equal(after(FAILED_PRECONDITION, 'FingerprintError: other data', true), 'end');
    assert.equal(after(NOT_FOUND, '', true), 'end');
    assert.equal(after(ABORTED, 'StaleError: an older incarnation', true), 'enroll');
    for (const fromControl of [true, false]) {
        assert.equal(after(FAILED_PRECONDITION, 'RefusedError: the run is over', fromControl), 'fallback');
        assert.equal(after(INVALID_ARGUMENT, 'ProtocolError: no hello', fromControl), 'fallback');
        assert.equal(after(UNAVAILABLE, 'Connection dropped', fromControl), 'fallback');
    }
    assert.equal(after(FAILED_PRECONDITION, 'FingerprintError: other data', false), 'fallback');
    assert.equal(after(ABORTED, 'StaleError: an older incarnation', false), 'fallback');
});

test('details name the error, else the code does', () => {
    const { name, message } = fromStatus({ code: status.UNKNOWN, details: 'CreditError: chunk 7: too far' });
    assert.deepEqual([name, message], ['CreditError', 'chunk 7: too far']);
    assert.equal(fromStatus({ code: status.DATA_LOSS, details: 'lost' }).name, 'ChecksumError');
    assert.equal(fromStatus({ code: status.CANCELLED, details: '' }).name, 'LinkClosedError');
});
