// Reads a GGUF file with llama.cpp: node llama_cpp.mjs FOLDER_WITH_NODE_MODULES REQUEST.json ANSWER.json
// The request: {"file": PATH, "texts": [TEXT, ...], "ids": [[ID, ...], ...], "lora": PATH, "prompts": [[ID, ...], ...], "count": N}.
// The answer: the ids of each text, the probabilities of all next tokens after each of the given ids, the tokens that end an answer,
// and the N likeliest tokens after each of the prompts, with keys and values in fp32; or what went wrong.
import {createRequire} from "module";
import {readFileSync, writeFileSync} from "fs";
import {pathToFileURL} from "url";

const [folder, request, written] = process.argv.slice(2);
const find = createRequire(`${folder}/package.json`);
const {getLlama} = await import(pathToFileURL(find.resolve("node-llama-cpp")));
const {file, texts = [], ids = [], vocabulary = 0, lora = "", prompts = [], count = 0} = JSON.parse(readFileSync(request, "utf8"));
const llama = await getLlama({gpu: false, build: "never", logLevel: "error", maxThreads: 1});
let answer;
try {
    const model = await llama.loadModel({modelPath: file, checkTensors: true});
    const longest = Math.max(8, ...ids.map((row) => row.length + 1), ...prompts.map((row) => row.length + count + 1));
    const exact = {experimentalKvCacheKeyType: "F32", experimentalKvCacheValueType: "F32", flashAttention: false};
    const context = await model.createContext({
        contextSize: longest, sequences: 1, batchSize: longest, threads: 1,
        ...(prompts.length ? exact : {}), ...(lora ? {lora} : {}),
    });
    const sequence = context.getSequence();
    const probabilities = [];
    for (const row of ids) {
        await sequence.clearHistory();
        const options = {probabilities: true, options: {temperature: 1, topK: 0, topP: 1, minP: 0}};
        const results = await sequence.controlledEvaluate(row.map((id) => [id, {generateNext: options}]));
        probabilities.push(results.map((result) => Object.fromEntries(result.next.probabilities)));
    }
    const continued = [];
    for (const row of prompts) {
        await sequence.clearHistory();
        const said = [];
        for await (const id of sequence.evaluate(row, {temperature: 0})) {
            said.push(id);
            if (said.length >= count) break;
        }
        continued.push(said);
    }
    const tokens = model.tokens;
    answer = {
        tokens: texts.map((text) => model.tokenize(text, true)),
        probabilities,
        continued,
        begins: tokens.shouldPrependBosToken,
        ends: [...Array(vocabulary).keys()].filter((id) => model.isEogToken(id)),
    };
} catch (error) {
    answer = {error: String(error)};
}
writeFileSync(written, JSON.stringify(answer));
process.exit(0);
