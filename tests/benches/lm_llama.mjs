// llama.cpp's side of lm_peers.py: prints one line of JSON.
//
//     node lm_llama.mjs MODEL WORKLOAD FOLDER_WITH_NODE_MODULES THREADS

import fs from "node:fs";
import path from "node:path";
import {createRequire} from "node:module";

const [weights, file, installed, threads] = process.argv.slice(2);
const {getLlama, LlamaLogLevel} = await import(createRequire(path.resolve(installed, "x.js")).resolve("node-llama-cpp"));
const llama = await getLlama({gpu: false, build: "never", logLevel: LlamaLogLevel.error, maxThreads: Number(threads)});
const workload = JSON.parse(fs.readFileSync(file, "utf8"));
const model = await llama.loadModel({modelPath: weights});
// Of each sequence.
const options = {contextSize: 1024, batchSize: 512, threads: Number(threads)};
const context = await model.createContext({...options, sequences: 8});
const sequences = Array.from({length: 8}, () => context.getSequence());

// Seconds until all prompts have their first token, and from then on until each has so many more.
async function answer(prompts, steps) {
    const used = sequences.slice(0, prompts.length);
    await Promise.all(used.map((sequence) => sequence.clearHistory()));
    const begun = performance.now();
    const tokens = used.map((sequence, at) => sequence.evaluate(prompts[at], {temperature: 0, yieldEogToken: true}));
    const each = () => Promise.all(tokens.map((tokens) => tokens.next()));
    await each();
    const first = performance.now();
    for (let at = 0; at < steps; at++)
        await each();
    const over = performance.now();
    await Promise.all(tokens.map((tokens) => tokens.return()));
    return [(first - begun) / 1e3, (over - first) / 1e3];
}

const {long, short, eight, steps} = workload;
await answer([short], 2);
const [first] = await answer([short], 0);
const [prefill] = await answer([long], 0);
const [, one] = await answer([short], steps);
const [, all] = await answer(eight, steps);
console.log(JSON.stringify({
    first_token_ms: first * 1e3, prefill: long.length / prefill, decode_1: steps / one, decode_8: 8 * steps / all,
    peak_mib: process.resourceUsage().maxRSS / 1024
}));
await llama.dispose();
