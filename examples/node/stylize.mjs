#!/usr/bin/env node
// Paints a photo in the style of a painting. Needs only the proto of a Gramophone server.
//
//   node stylize.mjs photo.jpg painting.jpg -o out.png [--target 127.0.0.1:50051] [--preset fast] [--size 512]
//                    [--iterations 100] [--frames FOLDER] [--timeout 600] [--keepalive 20]
//   node stylize.mjs --info
//
// The exit codes are those of the command `gramophone`: 0 done, 2 bad request, 3 no server, 4 no room or no time, 5 failed,
// 130 interrupted.

import { mkdir, readFile, writeFile } from 'node:fs/promises';
import path from 'node:path';
import process from 'node:process';
import { Readable } from 'node:stream';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';

import grpc from '@grpc/grpc-js';
import protoLoader from '@grpc/proto-loader';
import protobuf from 'protobufjs';

const HERE = path.dirname(fileURLToPath(import.meta.url));
const PROTOS = path.join(HERE, '..', '..', 'proto');
const LARGEST_MESSAGE = 2 ** 26; // bytes; gRPC's default is 4 MiB, and a PNG of 2048 px can be larger
const INLINE = 2 ** 21; // bytes; two images of at most this size fit in a request at every server
const CHUNK = 2 ** 16; // bytes
const EXIT = { done: 0, badRequest: 2, noServer: 3, noRoom: 4, failed: 5, interrupted: 130 };
const EXIT_OF = {
  [grpc.status.INVALID_ARGUMENT]: EXIT.badRequest,
  [grpc.status.ALREADY_EXISTS]: EXIT.badRequest,
  [grpc.status.NOT_FOUND]: EXIT.badRequest,
  [grpc.status.UNAVAILABLE]: EXIT.noServer,
  [grpc.status.UNIMPLEMENTED]: EXIT.noServer,
  [grpc.status.RESOURCE_EXHAUSTED]: EXIT.noRoom,
  [grpc.status.DEADLINE_EXCEEDED]: EXIT.noRoom,
  [grpc.status.CANCELLED]: EXIT.interrupted,
};

const USAGE = 'usage: node stylize.mjs PHOTO PAINTING -o OUT.png, or node stylize.mjs --info';
const HELP = `${USAGE}

  --target HOST:PORT   (default: 127.0.0.1:50051)
  --preset NAME        (default: fast)
  --size PIXELS        longest side of the result
  --iterations COUNT   at the largest scale
  --frames FOLDER      save the pictures on the way
  --timeout SECONDS    (default: 600)
  --keepalive SECONDS  without data before a ping; 0: none (default: 20)`;

/** An error in the command line: printed without a stack trace. */
class Usage extends Error {}

/** The service, from the proto at run time. */
const api = grpc.loadPackageDefinition(
  protoLoader.loadSync('gramophone/v1/style_transfer.proto', {
    includeDirs: [PROTOS],
    enums: String,
    longs: Number, // sequence numbers, which are far below 2^53
    defaults: true,
    oneofs: true,
  }),
).gramophone.v1;

/** @param {number} keepaliveS - seconds without data before a ping; the server allows one per 10 s. 0: no pings */
function connected(target, keepaliveS) {
  return new api.StyleTransferService(target, grpc.credentials.createInsecure(), {
    'grpc.max_receive_message_length': LARGEST_MESSAGE,
    ...(keepaliveS && { 'grpc.keepalive_time_ms': 1000 * keepaliveS }),
  });
}

/**
 * The details in an error's trailers.
 * @param {grpc.ServiceError} error
 * @returns {{reason: string, violations: {field: string, description: string}[], retryS: number | undefined}}
 */
function details(error) {
  const parsed = { reason: '', violations: [], retryS: undefined };
  const [bytes] = error.metadata?.get('grpc-status-details-bin') ?? [];
  if (!bytes) return parsed;
  const root = protobuf.loadSync(path.join(HERE, '..', 'rpc_errors.proto'));
  for (const { typeUrl, value } of root.lookupType('google.rpc.Status').decode(bytes).details) {
    const name = typeUrl.split('/').at(-1);
    if (name === 'google.rpc.ErrorInfo') parsed.reason = root.lookupType(name).decode(value).reason;
    if (name === 'google.rpc.BadRequest') parsed.violations = root.lookupType(name).decode(value).fieldViolations;
    if (name === 'google.rpc.RetryInfo') {
      const { seconds, nanos } = root.lookupType(name).decode(value).retryDelay;
      parsed.retryS = Number(seconds) + nanos / 1e9;
    }
  }
  return parsed;
}

/** Replaces the status line on a terminal; prints nothing if standard error is none. */
function showStatus(line) {
  if (process.stderr.isTTY) process.stderr.write(`\r\x1b[K${line.slice(0, (process.stderr.columns ?? 80) - 1)}`);
}

/** @returns {Promise<Buffer>} the bytes of an image file; rejects with a usage error that names it */
async function image(file) {
  return readFile(file).catch((error) => {
    throw new Usage(`${file}: cannot be read (${error.code})`);
  });
}

/**
 * The image as a field of a request: a large one is uploaded and named by its digest.
 * @returns {Promise<object>} an ImageSource; rejects with a usage error or a ServiceError
 */
async function source(client, file, deadline) {
  const data = await image(file);
  if (data.length <= INLINE) return { data };
  const { digest } = await new Promise((resolve, reject) => {
    const call = client.uploadImage({ deadline }, (error, answer) => (error ? reject(error) : resolve(answer)));
    const chunks = Array.from({ length: Math.ceil(data.length / CHUNK) }, (_, i) => data.subarray(i * CHUNK, (i + 1) * CHUNK));
    Readable.from(chunks.map((chunk) => ({ chunk }))).pipe(call);
  });
  return { digest };
}

/** Streams one job; resolves with its Result or rejects with a ServiceError. */
async function stylize(client, [photo, painting], options) {
  const recipe = { preset: preset(options.preset) };
  for (const name of ['size', 'iterations']) {
    if (options[name] !== undefined) recipe[name] = whole(name, options[name]);
  }
  const deadline = Date.now() + 1000 * whole('timeout', options.timeout);
  const [content, style] = await Promise.all([photo, painting].map((file) => source(client, file, deadline)));
  const spec = { content, styles: [{ image: style }], recipe };
  if (options.frames) {
    await mkdir(options.frames, { recursive: true });
    spec.frames = { format: 'IMAGE_FORMAT_JPEG' };
  }
  const call = client.stylizeStream({ spec }, { deadline, waitForReady: false });
  process.once('SIGINT', () => call.cancel());
  let result;
  for await (const { event } of call) {
    switch (event.event) {
      case 'accepted':
        showStatus(`accepted: ${event.accepted.width} x ${event.accepted.height} px`);
        break;
      case 'waiting':
        showStatus(`waiting, place ${event.waiting.queuePosition}`);
        break;
      case 'progress':
        showStatus(`iteration ${event.progress.iteration} of ${event.progress.iterations}, loss ${event.progress.losses.total.toPrecision(4)}`);
        break;
      case 'frame': {
        const name = `${String(event.frame.iteration).padStart(6, '0')}.jpg`;
        await writeFile(path.join(options.frames, name), event.frame.image.data);
        break;
      }
      case 'result':
        result = event.result;
        break;
      default: // an event of a newer server
    }
  }
  showStatus('');
  return result;
}

/** The enum name of a preset. The loader would send an unknown name as 0, the default. */
function preset(name) {
  const known = api.Preset.type.value.map((value) => value.name).filter((value) => !value.endsWith('UNSPECIFIED'));
  const enumName = `PRESET_${name.toUpperCase()}`;
  if (known.includes(enumName)) return enumName;
  const names = known.map((value) => value.replace('PRESET_', '').toLowerCase());
  throw new Usage(`--preset must be one of ${names.join(', ')}, got ${name}`);
}

function whole(name, text) {
  if (!/^\d+$/.test(text)) throw new Usage(`--${name} must be a whole number, got ${text}`);
  return Number(text);
}

function info(client) {
  return new Promise((resolve, reject) => {
    const deadline = Date.now() + 10_000;
    client.getServerInfo({}, { deadline }, (error, answer) => (error ? reject(error) : resolve(answer)));
  });
}

async function main() {
  const { values: options, positionals: images } = parseArgs({
    allowPositionals: true,
    options: {
      target: { type: 'string', default: '127.0.0.1:50051' },
      output: { type: 'string', short: 'o' },
      preset: { type: 'string', default: 'fast' },
      size: { type: 'string' },
      iterations: { type: 'string' },
      frames: { type: 'string' },
      timeout: { type: 'string', default: '600' },
      keepalive: { type: 'string', default: '20' },
      info: { type: 'boolean', default: false },
      help: { type: 'boolean', short: 'h', default: false },
    },
  });
  if (options.help) {
    console.log(HELP);
    return;
  }
  if (!options.info && (images.length !== 2 || !options.output)) {
    throw new Usage(`${USAGE}; see --help`);
  }
  const client = connected(options.target, whole('keepalive', options.keepalive));
  try {
    if (options.info) {
      const { version, device, precision, backbone, weights, runningJobs, queuedJobs } = await info(client);
      console.log(JSON.stringify({ version, device, precision, backbone, weights, runningJobs, queuedJobs }, null, 2));
      return;
    }
    const { image: picture, iterations, stopReason } = await stylize(client, images, options);
    await writeFile(options.output, picture.data);
    console.log(`${options.output}: ${picture.width} x ${picture.height} px, ${iterations} iterations, ${stopReason}`);
  } finally {
    client.close();
  }
}

main().catch((error) => {
  showStatus('');
  if (error instanceof Usage || error.code?.startsWith?.('ERR_PARSE_ARGS') || error.syscall) {
    console.error(`stylize: ${error.message}`);
    process.exitCode = EXIT.badRequest;
    return;
  }
  if (!(error.code in grpc.status)) throw error;
  const { reason, violations, retryS } = details(error);
  console.error(`stylize: ${error.details} (${[grpc.status[error.code], reason].filter(Boolean).join(', ')})`);
  if (violations.length > 1) for (const { field, description } of violations) console.error(`  ${field} ${description}`);
  if (retryS !== undefined) console.error(`  retry in ${retryS.toFixed(1)} s`);
  process.exitCode = EXIT_OF[error.code] ?? EXIT.failed;
});
