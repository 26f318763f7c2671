// The same prompts through llama.cpp (npm node-llama-cpp), on the GGUF's own quantised blocks: greedy, 32 tokens, on past the end of an
// answer. Checks first that llama.cpp cuts every golden text and prompt into the same tokens as the `tokenizers` package.
//
//     node llama_cpp.mjs WEIGHTS.gguf GOLDEN_FOLDER FOLDER_WITH_NODE_MODULES [--time [THREADS]]
//
// reads texts.json and smollm2.json there, writes llama_cpp.json: its tokens, and where it parts from PyTorch with the margin there
// (the difference of PyTorch's two best logits). llama.cpp rounds activations to 8 bits before each product, so it may part where the
// margin is small; nobody who keeps them in 32 bits should.

import fs from "node:fs";
import os from "node:os";
import path from "node:path";
import {createRequire} from "node:module";


const TOKENS = 32;
const PRES = ["smollm", "gpt-2", "llama-bpe", "qwen2", "default"];

const [weights, golden, installed, ...options] = process.argv.slice(2);
// Its threads wait by spinning: more than one costs much where other work runs, and gives the same tokens.
const THREADS = options[0] === "--time" ? Number(options[1] ?? 2) : 1;
const {getLlama, LlamaLogLevel} = await import(createRequire(path.resolve(installed, "x.js")).resolve("node-llama-cpp"));
const version = JSON.parse(fs.readFileSync(path.join(installed, "node_modules/node-llama-cpp/package.json"))).version;
const llama = await getLlama({gpu: false, build: "never", logLevel: LlamaLogLevel.error, maxThreads: THREADS});
const read = (name) => JSON.parse(fs.readFileSync(path.join(golden, name), "utf8"));

async function texts() {
    const wanted = read("texts.json");
    const defaults = [];
    const differ = [];
    for (const pre of PRES) {
        const model = await llama.loadModel({
            modelPath: weights, vocabOnly: true, metadataOverrides: {tokenizer: {ggml: {pre}}}
        });
        for (const row of wanted) {
            const ids = model.tokenize(row.text, true);
            if (pre === "default")
                defaults.push(ids);
            else if (JSON.stringify(ids) !== JSON.stringify(row[pre]))
                differ.push({pre, text: row.text, ids});
        }
        await model.dispose();
    }
    return {defaults, differ};
}

async function take(sequence, prompt, tokens) {
    await sequence.clearHistory();
    const ids = [];
    for await (const id of sequence.evaluate(prompt, {temperature: 0, yieldEogToken: true})) {
        ids.push(id);
        if (ids.length === tokens)
            break;
    }
    return ids;
}

async function compare(model, sequence) {
    const lines = [];
    let agree = 0;
    for (const prompt of read("smollm2.json").prompts) {
        const own = model.tokenize(prompt.text, true);
        if (JSON.stringify(own) !== JSON.stringify(prompt.prompt))
            throw new Error(`${prompt.name}: llama.cpp's tokens are ${own}, the golden ones ${prompt.prompt}`);
        const continuation = await take(sequence, prompt.prompt, TOKENS);
        const at = continuation.findIndex((id, at) => id !== prompt.continuation[at]);
        agree += at < 0;
        lines.push(JSON.stringify({name: prompt.name, continuation, ...(at < 0 ? {} : {parts: at, margin: prompt.margins[at]})}));
    }
    return {lines, agree};
}

async function measure(model, sequence) {
    const prompts = read("smollm2.json").prompts.map((prompt) => prompt.prompt);
    const long = prompts.filter((prompt) => prompt.length >= 200);
    const rate = async (tokens, work) => {
        const [wall, cpu] = [performance.now(), process.cpuUsage()];
        await work();
        const {user, system} = process.cpuUsage(cpu);
        const seconds = [(performance.now() - wall) / 1e3, (user + system) / 1e6];
        return `${(tokens / seconds[0]).toFixed(1)} tokens/s (${(tokens / seconds[1]).toFixed(1)} a second of processor time)`;
    };
    for (let round = 0; round < 3; round++) {
        const prefill = await rate(long.flat().length, async () => {
            for (const prompt of long)
                await take(sequence, prompt, 1);
        });
        // The first token comes out of the prompt: all after it are decoded one by one.
        await sequence.clearHistory();
        const tokens = sequence.evaluate(prompts[0], {temperature: 0, yieldEogToken: true});
        await tokens.next();
        const decode = await rate(64, async () => {
            for (let at = 0; at < 64; at++)
                await tokens.next();
        });
        await tokens.return();
        console.log(`prefill ${prefill}, decode ${decode}, load ${os.loadavg()[0].toFixed(1)}`);
    }
}

const model = await llama.loadModel({modelPath: weights});
const context = await model.createContext({contextSize: 1024, batchSize: 512, threads: THREADS});
const sequence = context.getSequence();
if (options[0] === "--time") {
    console.log(`node-llama-cpp ${version}, ${THREADS} threads, ${path.basename(weights)}`);
    await measure(model, sequence);
} else {
    const {defaults, differ} = await texts();
    const {lines, agree} = await compare(model, sequence);
    const head = {made_by: `node-llama-cpp ${version}`, weights: path.basename(weights), agree, texts_differ: differ, texts_default: defaults};
    fs.writeFileSync(path.join(golden, "llama_cpp.json"), `${JSON.stringify(head).slice(0, -1)}, "prompts": [\n${lines.join(",\n")}\n]}\n`);
    console.log(`${agree} of ${lines.length} prompts agree, ${differ.length} texts differ`);
}
await llama.dispose();
