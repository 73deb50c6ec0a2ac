// Load test of a Gramophone server from outside Python: calls StylizeStream and measures the times that a user sees.
//
//   k6 run benchmarks/k6/stylize_stream.js
//   k6 run -e TARGET=127.0.0.1:50051 -e VUS=8 -e DURATION=30s -e SIZE=64 -e ITERATIONS=20 benchmarks/k6/stylize_stream.js
//   k6 run -e RATE=5 -e DURATION=60s ...         open loop: this many new jobs per second
//
// Other settings: PHOTO and PAINTING (files of at most 4 MiB together, because the script sends them with each job and uploads
// nothing; default: a chequered square of 64 px), PRESET (fast), FRAMES=0 for no frames,
// TIMEOUT (60 s per job), MAX_VUS (200, open loop), JSON (a file for the summary). A refused job is counted in
// `jobs_refused` and is not an error of the run. The run fails if a job ends in neither a result nor a typed refusal.

import encoding from 'k6/encoding';
import { sleep } from 'k6';
import exec from 'k6/execution';
import grpc from 'k6/net/grpc';
import { Counter, Trend } from 'k6/metrics';

const CHEQUERED =
  'iVBORw0KGgoAAAANSUhEUgAAAEAAAABACAIAAAAlC+aJAAAAbElEQVR42u3XoQ0AIAwEwA7WsRmCsXANBlUD4ZKXFT31+YiMLaMy' +
  'M7aMynX3AAAAAACt+2cePdwDAAAAAPQAmhgAAADAHtDEAAAAAPaAJgYAAACwBzQxAAAAgD2giQEAAADsAU0MAAAA8A1gASXnoOKf5D+pAAAA' +
  'AElFTkSuQmCC';

const env = (name, otherwise) => __ENV[name] || otherwise;
const target = env('TARGET', '127.0.0.1:50051');
const timeout = `${env('TIMEOUT', '60')}s`;
let imageBytes = 0;
const image = (name) => {
  if (!__ENV[name]) return CHEQUERED;
  const data = open(__ENV[name], 'b');
  imageBytes += data.byteLength;
  if (imageBytes > 2 ** 22) throw new Error(`PHOTO and PAINTING must have at most 4 MiB together, got ${imageBytes} bytes`);
  return encoding.b64encode(data);
};
const spec = {
  content: { data: image('PHOTO') },
  styles: [{ image: { data: image('PAINTING') } }],
  recipe: {
    preset: `PRESET_${env('PRESET', 'fast').toUpperCase()}`,
    size: Number(env('SIZE', '64')),
    iterations: Number(env('ITERATIONS', '20')),
    smallestSize: 0,
  },
};
if (env('FRAMES', '1') !== '0') spec.frames = { everyIterations: 0 };

const duration = env('DURATION', '20s');
const scenario = __ENV.RATE
  ? {
      executor: 'constant-arrival-rate',
      rate: Number(__ENV.RATE),
      duration,
      preAllocatedVUs: Number(env('VUS', '8')),
      maxVUs: Number(env('MAX_VUS', '200')),
    }
  : { executor: 'constant-vus', vus: Number(env('VUS', '8')), duration };

export const options = {
  scenarios: { jobs: { ...scenario, gracefulStop: timeout } },
  thresholds: { jobs_failed: ['count==0'] },
  summaryTrendStats: ['min', 'med', 'p(95)', 'p(99)', 'max'],
};

const timeToAccepted = new Trend('time_to_accepted', true);
const timeToFirstFrame = new Trend('time_to_first_frame', true);
const frameGap = new Trend('frame_gap', true);
const timeToResult = new Trend('time_to_result', true);
const frames = new Counter('frames');
const framesDropped = new Counter('frames_dropped');
const pictureBytes = new Counter('picture_bytes');
const jobsDone = new Counter('jobs_done');
const jobsRefused = new Counter('jobs_refused'); // queue full, or deadline too short; tagged with the status
const jobsFailed = new Counter('jobs_failed');
const jobsUnderWay = new Counter('jobs_cut_off'); // by the end of the run

const client = new grpc.Client();
client.load(['../../proto'], 'gramophone/v1/style_transfer.proto');
const REFUSALS = { [grpc.StatusResourceExhausted]: 'RESOURCE_EXHAUSTED', [grpc.StatusUnavailable]: 'UNAVAILABLE' };
let connected = false;

export default function () {
  const began = Date.now();
  let lastFrame = 0;
  let stream;
  try {
    if (!connected) {
      client.connect(target, { plaintext: true, timeout: '10s', maxReceiveSize: 2 ** 26, maxSendSize: 2 ** 26 });
      connected = true;
    }
    stream = new grpc.Stream(client, 'gramophone.v1.StyleTransferService/StylizeStream', { timeout });
  } catch (error) {
    jobsFailed.add(1, { status: 'no server' });
    console.error(`no job could be sent to ${target}: ${String(error.message || error).split('\n')[0]}`);
    sleep(1); // avoids thousands of attempts in a row
    return;
  }

  // Every stream ends with an "end" event, also after an error. So the outcome is stored here and counted once.
  let ending = null;
  stream.on('data', ({ event }) => {
    const now = Date.now();
    if (event.accepted) {
      timeToAccepted.add(now - began);
    } else if (event.frame) {
      if (lastFrame) frameGap.add(now - lastFrame);
      else timeToFirstFrame.add(now - began);
      lastFrame = now;
      frames.add(1);
      framesDropped.add(event.frame.dropped || 0);
      pictureBytes.add(bytes(event.frame.image));
    } else if (event.result) {
      timeToResult.add(now - began);
      pictureBytes.add(bytes(event.result.image));
      ending = () => jobsDone.add(1, { stop_reason: event.result.stopReason });
    }
  });
  stream.on('error', (error) => {
    const status = REFUSALS[error.code];
    if (status) ending = () => jobsRefused.add(1, { status });
    else if (error.code === grpc.StatusCanceled && exec.scenario.progress >= 1) ending = () => jobsUnderWay.add(1);
    else {
      ending = () => jobsFailed.add(1, { status: String(error.code) });
      console.error(`a job failed with code ${error.code}: ${error.message}`);
    }
    settle();
  });
  stream.on('end', settle);

  function settle() {
    if (!ending) {
      ending = () => jobsFailed.add(1, { status: 'none' });
      console.error('a stream ended with neither a result nor an error');
    }
    ending();
    ending = () => {};
  }

  stream.write({ spec });
  stream.end();
}

/** Size of a picture in bytes; its data is base64. */
function bytes(picture) {
  return Math.floor((picture.data.length * 3) / 4);
}

export function handleSummary(data) {
  const count = (name) => (data.metrics[name] ? data.metrics[name].values.count : 0);
  const seconds = data.state.testRunDurationMs / 1000;
  const trend = (name, title) => {
    const values = data.metrics[name] && data.metrics[name].values;
    if (!values || values.max === undefined) return `${title.padEnd(22)} -`;
    const cells = ['min', 'med', 'p(95)', 'p(99)', 'max'].map((stat) => values[stat].toFixed(0).padStart(8));
    return `${title.padEnd(22)}${cells.join('')}`;
  };
  const lines = [
    '',
    `${count('jobs_done')} jobs done in ${seconds.toFixed(1)} s: ${(count('jobs_done') / seconds).toFixed(2)} a second; ` +
      `${count('jobs_refused')} refused, ${count('jobs_failed')} failed, ${count('jobs_cut_off')} cut off by the end`,
    `${count('frames')} frames, ${count('frames_dropped')} dropped; pictures ${(count('picture_bytes') / 1e6).toFixed(2)} MB`,
    '',
    `${'milliseconds'.padEnd(22)}     min     med     p95     p99     max`,
    trend('time_to_accepted', 'to acceptance'),
    trend('time_to_first_frame', 'to the first frame'),
    trend('frame_gap', 'between frames'),
    trend('time_to_result', 'to the result'),
    '',
  ];
  const out = { stdout: lines.join('\n') };
  if (__ENV.JSON) out[__ENV.JSON] = JSON.stringify(data, null, 2);
  return out;
}
