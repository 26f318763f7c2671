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

// By the wall, and of the processors.
function seconds() {
    const {user, system} = process.cpuUsage();
    return [performance.now() / 1e3, (user + system) / 1e6];
}
const since = (begun) => seconds().map((now, at) => now - begun[at]);

// What it takes until all prompts have their first token, and from then on until each has so many more.
async function answer(prompts, steps) {
    const used = sequences.slice(0, prompts.length);
    await Promise.all(used.map((sequence) => sequence.clearHistory()));
    const begun = seconds();
    const tokens = used.map((sequence, at) => sequence.evaluate(prompts[at], {temperature: 0, yieldEogToken: true}));
    const each = () => Promise.all(tokens.map((tokens) => tokens.next()));
    await each();
    const [first, then] = [since(begun), seconds()];
    for (let at = 0; at < steps; at++)
        await each();
    const rest = since(then);
    await Promise.all(tokens.map((tokens) => tokens.return()));
    return [first, rest];
}

const {long, short, firsts, eight, steps} = workload;
await answer([short], 2);
const first = [0, 0];
for (const prompt of firsts)
    (await answer([prompt], 0))[0].forEach((seconds, at) => (first[at] += seconds));
const [prefill] = await answer([long], 0);
const [, one] = await answer([short], steps);
const [, all] = await answer(eight, steps);
console.log(JSON.stringify({
    first_token_ms: first.map((seconds) => seconds * 1e3 / firsts.length), prefill: prefill.map((seconds) => long.length / seconds),
    decode_1: one.map((seconds) => steps / seconds), decode_8: all.map((seconds) => 8 * steps / seconds),
    peak_mib: process.resourceUsage().maxRSS / 1024
}));
await llama.dispose();
